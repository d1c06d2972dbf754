"""The formats by name, each with a row to show."""

from collections.abc import Callable
from typing import Any

from tuner.dataset.formats.agent_logs import AGENT_FLAN_EXAMPLE, MSAGENT_EXAMPLE, agent_flan, msagent
from tuner.dataset.formats.bfcl_questions import BFCL_EXAMPLE, bfcl
from tuner.dataset.formats.fields import Row
from tuner.dataset.formats.instructions import ALPACA_EXAMPLE, QA_EXAMPLE, alpaca, qa
from tuner.dataset.formats.openai_messages import OPENAI_EXAMPLE, openai
from tuner.dataset.formats.plain_text import TEXT_EXAMPLE, text
from tuner.dataset.formats.preferences import PREFERENCE_EXAMPLE, preference
from tuner.dataset.formats.repositories import REPOSITORY_EXAMPLE, repository
from tuner.dataset.formats.role_turns import (
    FTDP_EXAMPLE,
    INTERPRETER_EXAMPLE,
    LAGENT_EXAMPLE,
    ftdp,
    interpreter,
    lagent,
)
from tuner.dataset.formats.sharegpt_turns import SHAREGPT_EXAMPLE, sharegpt
from tuner.dataset.formats.token_ids import TOKENS_EXAMPLE, tokens
from tuner.dataset.formats.toolbench_trees import TOOLBENCH_EXAMPLE, toolbench
from tuner.dataset.formats.xtuner_turns import XTUNER_EXAMPLE, xtuner

FORMATS: dict[str, Callable[[Row], dict[str, Any]]] = {
    "openai": openai,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "qa": qa,
    "text": text,
    "repository": repository,
    "xtuner": xtuner,
    "ftdp": ftdp,
    "lagent": lagent,
    "interpreter": interpreter,
    "msagent": msagent,
    "agent_flan": agent_flan,
    "toolbench": toolbench,
    "bfcl": bfcl,
    "preference": preference,
    "tokens": tokens,
}
EXAMPLES: dict[str, Row] = {
    "openai": OPENAI_EXAMPLE,
    "sharegpt": SHAREGPT_EXAMPLE,
    "alpaca": ALPACA_EXAMPLE,
    "qa": QA_EXAMPLE,
    "text": TEXT_EXAMPLE,
    "repository": REPOSITORY_EXAMPLE,
    "xtuner": XTUNER_EXAMPLE,
    "ftdp": FTDP_EXAMPLE,
    "lagent": LAGENT_EXAMPLE,
    "interpreter": INTERPRETER_EXAMPLE,
    "msagent": MSAGENT_EXAMPLE,
    "agent_flan": AGENT_FLAN_EXAMPLE,
    "toolbench": TOOLBENCH_EXAMPLE,
    "bfcl": BFCL_EXAMPLE,
    "preference": PREFERENCE_EXAMPLE,
    "tokens": TOKENS_EXAMPLE,
}
# What can be read but not trained on, and what to do.
UNTRAINED = {
    "preference": "No method trains on preference pairs yet; supervised fine-tuning takes one answer a row. "
    "Keep the chosen one, as openai messages."
}
