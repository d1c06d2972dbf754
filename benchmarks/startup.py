"""CPU seconds until the commands that must feel instant are done; the goal is 0.3 each.

Run: python benchmarks/startup.py
"""

import resource
import statistics
import subprocess
import sys

GOAL, REPEATS = 0.3, 5
START = "import sys; from tuner.cli import main; sys.argv[0] = 'tuner'; main()"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "tuner --help": ["-c", START, "--help"],
    "tuner list-cfg": ["-c", START, "list-cfg"],
    "tuner list-formats": ["-c", START, "list-formats"],
    "tuner train --help": ["-c", START, "train", "--help"],
    "tuner copy-cfg (unknown)": ["-c", START, "copy-cfg", "no_such_preset", "."],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of one fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line for each command; exit with 1 where the goal is missed."""
    missed = False
    for name, arguments in COMMANDS.items():
        cpu_seconds(arguments)  # writes the byte code
        seconds = statistics.median(cpu_seconds(arguments) for _ in range(REPEATS))
        missed |= seconds > GOAL
        print(f"{name:28} {seconds:.3f} CPU s (goal {GOAL})")
    sys.exit(missed)


if __name__ == "__main__":
    main()
