"""Training from a config's text to a trained checkpoint: check, prepare the data, build, run."""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuner.check import check
from tuner.config import loads
from tuner.configs import literals
from tuner.engine.assemble import Assembly
from tuner.engine.checkpoint import write_text_atomically
from tuner.engine.machine import set_num_threads
from tuner.engine.randomness import seed_everything
from tuner.engine.runner import Parts, Runner, RunRecord
from tuner.engine.work_dir import choose_checkpoint, locked, write_config
from tuner.errors import UserError


def train(source: str, *, work_dir: Path, resume: str | None = None, name: str = "config.py") -> Path:
    """Train what the config says; returns the work dir.

    Args:
        source: the text of a config with all settings filled in.
        work_dir: gets config.py, ledger.json, metrics.jsonl, tensorboard/, curves.png, samples.jsonl, checkpoints/.
        resume: None begins, "auto" goes on from the newest checkpoint of `work_dir`, a path from that one.
        name: what error messages call the config.

    Raises:
        UserError: whatever the user can mend, before the first step where it can be known by then.
    """
    config = loads(source, name)
    check(config)
    settings = {key: setting.value for key, setting in literals.settings(source, name).items()}
    work_dir = work_dir.resolve()
    with locked(work_dir):
        checkpoint = choose_checkpoint(work_dir, resume)
        write_config(work_dir, source, checkpoint is not None)
        build_runner(config, source, settings, work_dir=work_dir, checkpoint=checkpoint).train()
    return work_dir


def build_runner(
    config: Any, source: str, settings: dict[str, Any], *, work_dir: Path, checkpoint: Path | None = None
) -> Runner:
    """Data first (it may take hours and fail on a row), then weights, then the frame around them."""
    if "tokenizer" not in config:
        raise UserError("The config needs its tokenizer by name: tokenizer = dict(type=build_tokenizer, path=...).")
    assembly, seed = Assembly(config), config.get("seed", 0)
    set_num_threads()
    seed_everything(seed)
    tokenizer = assembly.build(config.tokenizer)
    dataloader = assembly.build(config.train_dataloader)
    save_ledger(dataloader, work_dir)
    model = assembly.build(config.model)
    check_vocabulary(tokenizer, model.llm)
    parts = Parts(
        model=model,
        dataloader=dataloader,
        optim_wrapper=config.optim_wrapper,
        schedule=assembly.build(config.param_scheduler),
        strategy=assembly.build(config.strategy),
        train_cfg=config.train_cfg,
        hooks=assembly.build(config.get("custom_hooks", [])),
    )
    record = RunRecord(source, json.loads(json.dumps(settings)), tokenizer, settings.get("chat_template"))
    seed_everything(seed)  # what building drew depends on the model's code; what training draws should not
    return Runner(parts, record, work_dir=work_dir, checkpoint=checkpoint)


def save_ledger(dataloader: DataLoader, work_dir: Path) -> None:
    """Where every token went, beside the run that used them."""
    ledger = dataloader.dataset.ledger.to_dict() | {"sources": dataloader.dataset.contributions}
    write_text_atomically(work_dir / "ledger.json", json.dumps(ledger, ensure_ascii=False, indent=1) + "\n")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel) -> None:
    """Every id that the tokenizer can give must have a row in the embedding.

    Raises:
        UserError: before the first step, where an index error (or, on a GPU, a dead process) would say it later.
    """
    num_rows = llm.get_input_embeddings().num_embeddings
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_rows:
        raise UserError(
            f"The tokenizer has ids up to {largest}, the model's embedding only {num_rows} rows. "
            "Use the tokenizer that belongs to the model (tokenizer.path), or another model_path."
        )
