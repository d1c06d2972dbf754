"""Replies of the model while it learns, to a few fixed prompts; training never notices."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuner.dataset.chat_template import ChatTemplate, Segment, render
from tuner.dataset.jinja_template import resolve_template
from tuner.dataset.tokenize import Encoder
from tuner.engine.aside import aside
from tuner.engine.frame import Hook
from tuner.engine.metrics import keep_lines
from tuner.engine.strategy import StepResult
from tuner.errors import UserError

if TYPE_CHECKING:
    from tuner.engine.runner import Runner

Prompt = str | Sequence[dict[str, Any]] | Mapping[str, str]
SAMPLES = "samples.jsonl"


class SampleChatHook(Hook):
    """Every `interval` steps, greedy replies to `prompts`: on the terminal and in samples.jsonl.

    A prompt is a user's turn, a list of messages, or {"text": ...}, which the model continues. Greedy, so that two
    samples differ only by what was learnt.
    """

    def __init__(self, *, prompts: Sequence[Prompt], interval: int = 100, max_new_tokens: int = 64) -> None:
        if interval < 0:
            raise UserError(f"sample_interval={interval}: choose 0 for never, or a number of steps.")
        self.interval = interval
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens

    def before_train(self, runner: "Runner") -> None:
        """Encode the prompts once, and cut off what a lost stretch of an earlier run left beyond the resumed step."""
        self.after_rollback(runner)
        if self.interval and self.prompts:
            self._encode(runner)

    def _encode(self, runner: "Runner") -> None:
        if runner.record.chat_template is None:
            raise UserError("sample_prompts need a chat_template; this config has none. Set sample_interval=0.")
        tokenizer = runner.record.tokenizer
        template = resolve_template(runner.record.chat_template, tokenizer)
        encoder = Encoder.from_tokenizer(tokenizer, template)
        rendered = [prompt_segments(prompt, template) for prompt in self.prompts]
        self.inputs = [document.ids.astype("int64").tolist() for document in encoder.encode(rendered)]
        self.stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in template.stop_tokens]

    def after_rollback(self, runner: "Runner") -> None:
        """Forget the samples since the checkpoint: they come again."""
        if runner.strategy.world.is_first:
            keep_lines(Path(runner.work_dir) / SAMPLES, runner.strategy.step)

    def after_train_iter(
        self, runner: "Runner", batch_idx: int, data_batch: Sequence[Any], outputs: StepResult
    ) -> None:
        """Sample where the interval says so."""
        step = runner.strategy.step
        if not self.interval or not self.prompts or step % self.interval:
            return
        for prompt, ids in zip(self.prompts, self.inputs):
            reply = self._reply(runner, ids)  # on all ranks: none may hold all of the weights
            if not runner.strategy.world.is_first:
                continue
            print(f"  sample at step {step} | {shown(prompt)}\n    > {reply}", flush=True)
            row = json.dumps({"step": step, "prompt": prompt, "reply": reply}, ensure_ascii=False)
            with (Path(runner.work_dir) / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(row + "\n")

    def _reply(self, runner: "Runner", ids: list[int]) -> str:
        """Generated text with its special tokens, so that tool calls show."""
        llm = runner.model.get_submodule("llm")
        inputs = torch.tensor([ids], device=runner.strategy.device)  # (1, T) int64
        with aside(llm), runner.strategy.generation():
            generated = llm.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=self.stop_ids,
                pad_token_id=self.stop_ids[0],
            )
        return runner.record.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=False)


def prompt_segments(prompt: Prompt, template: ChatTemplate) -> list[Segment]:
    """What the model reads before it speaks: a conversation up to its own turn, or a text without its end."""
    if isinstance(prompt, Mapping):
        return render({"text": prompt["text"]}, template)[:-1]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return render({"messages": messages, "tools": []}, template, add_generation_prompt=True)


def shown(prompt: Prompt) -> str:
    """The last thing a prompt says."""
    if isinstance(prompt, str):
        return prompt
    return prompt["text"] if isinstance(prompt, Mapping) else prompt[-1]["content"]
