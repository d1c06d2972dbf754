"""A model, its tokenizer and its template: a conversation becomes a reply that is shown while it comes."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from tuner.chat.shown import printable
from tuner.dataset.chat_template import ChatTemplate, Reply, parse_reply, render
from tuner.dataset.templates import JinjaTemplate
from tuner.dataset.tokenize import Encoder
from tuner.errors import UserError

Message = dict[str, Any]


def generation(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of `generate`; greedy decoding takes no temperature."""
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative. Use 0 for the likeliest token, or about 0.7.")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    return {"max_new_tokens": max_new_tokens, **sampling}


class ChatSession:
    """A model, its tokenizer and template: conversation -> streamed reply."""

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        template: ChatTemplate,
        generation: dict[str, Any],
    ) -> None:
        self.llm, self.tokenizer, self.template, self.generation = llm, tokenizer, template, generation
        self.encoder = Encoder.from_tokenizer(tokenizer, template)
        self.has_warned = False
        self.stop_ids = tokenizer.convert_tokens_to_ids(list(template.stop_tokens))

    def reply(self, messages: list[Message], tools: list[dict[str, Any]], write: Callable[[str], None]) -> Reply:
        """Generate one assistant turn; `write` gets its visible text while it comes.

        Raises:
            UserError: the template has no place for a message, or cannot be rendered within its limits.
        """
        segments = render({"messages": messages, "tools": tools}, self.template, add_generation_prompt=True)
        prompt = torch.from_numpy(self.encoder.encode([segments])[0].ids.astype("int64"))[None].to(self.llm.device)
        self.warn_beyond_context(prompt.shape[1])
        printer = ReplyPrinter(self.tokenizer, hidden=hidden_marks(self.template), write=write)
        with torch.inference_mode():
            try:
                self.llm.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=printer,
                    eos_token_id=self.stop_ids,
                    pad_token_id=self.stop_ids[0],
                    **self.generation,
                )
            except KeyboardInterrupt:
                write(" [stopped]")
        return parse_reply(printer.text, self.template)

    def warn_beyond_context(self, num_tokens: int) -> None:
        """Say once that a conversation has outgrown the model; it is not cut, which would make it another."""
        context = getattr(self.llm.config.get_text_config(), "max_position_embeddings", None)  # not every model has it
        if context is not None and num_tokens >= context and not self.has_warned:
            self.has_warned = True
            print(
                f"warning: the conversation has {num_tokens:,} tokens, the model was made for {context:,}: expect "
                "worse replies. /reset forgets all, /undo the last turn.",
                file=sys.stderr,
                flush=True,
            )


def hidden_marks(template: ChatTemplate) -> tuple[str, ...]:
    """From the first of these on a reply is not shown as it comes: its end, and calls, which are shown once read."""
    if not isinstance(template, JinjaTemplate):
        return template.special_tokens
    return template.stop_tokens if template.tools is None else (*template.stop_tokens, template.tools.start)


class ReplyPrinter(BaseStreamer):
    """Writes text as soon as its bytes are whole; from the first of the `hidden` marks on it keeps silent."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, hidden: tuple[str, ...], write: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.hidden, self.write = tokenizer, hidden, write
        self.ids: list[int] = []
        self.text = ""
        self.num_shown = 0
        self.saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt once, then the new tokens, one call each."""
        if not self.saw_prompt:
            self.saw_prompt = True
            return
        self.ids += value.flatten().tolist()
        self.text = self.tokenizer.decode(self.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self.show(whole=False)

    def end(self) -> None:
        self.show(whole=True)

    def show(self, *, whole: bool) -> None:
        """Write what is new and can no longer change: an unfinished character decodes to U+FFFD."""
        starts = [self.text.find(token) for token in self.hidden if token in self.text]
        visible = self.text[: min(starts, default=len(self.text))]
        if not whole and not starts and visible.endswith("\ufffd"):
            return
        if len(visible) > self.num_shown:
            self.write(printable(visible[self.num_shown :]))
            self.num_shown = len(visible)
