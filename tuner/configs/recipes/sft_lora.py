"""LoRA on conversations: small matrices beside the frozen weights train, and only the assistant's turns carry loss.

The settings come first; the assembly below uses each of them, so what is derived from a setting follows it.
`tuner train THIS_FILE lr=1e-5` replaces a setting for one run.
"""

from tuner.dataset.build import (
    PackedDataset,
    StageDatasets,
    StageShards,
    StreamedDataset,
    build_dataloader,
    build_shards,
    build_stream,
)
from tuner.dataset.needle_grid import NeedleGrid
from tuner.dataset.rendering import Rendering
from tuner.engine.hooks import CheckpointHook, CurvesHook, MetricsHook, NeedleHook, SampleChatHook
from tuner.engine.loop import TrainLoop
from tuner.engine.optimizer import adamw
from tuner.engine.schedule import WarmupCosine
from tuner.engine.strategies import build_strategy
from tuner.method.sft import SFT
from tuner.model.adapter import LoRA
from tuner.model.build import build_llm
from tuner.model.memory import Memory
from tuner.model.tokenizer import build_tokenizer

# settings: the model
model_path = "internlm/internlm2-7b"  # directory, or name on the Hugging Face hub
weights = "pretrained"  # "pretrained", or "random" to begin from scratch with the model's config.json
attention = "auto"  # "auto" takes the fastest that runs here; or "flash", "varlen", "sdpa", "eager"
gradient_checkpointing: bool | int | str = True  # compute again in backward: all; every n-th layer; all but "attention"
offload_activations = False  # put what gradient checkpointing keeps into the CPU's memory, where the GPU's is too small
tile_tokens: int | None = 8192  # tokens that feed-forward blocks take at a time, for less memory; None: all
precision = "bf16"  # "bf16", "fp16" or "fp32": what is computed in; trained weights stay fp32

# settings: the adapter
lora_rank = 64  # of each change: A is (rank, inputs), B (outputs, rank)
lora_alpha = 128.0  # the change is B A x times alpha / rank, or alpha / sqrt(rank) of "rslora"
lora_dropout = 0.0  # share of a layer's inputs that its adapter does not see in training
lora_variant = "lora"  # or "rslora"; or "dora", which also trains the length of each row: slower, more memory
lora_targets: str | list = "auto"  # "auto": all linear layers but the head; InternLM2's: wqkv, wo, w1, w2, w3 (output)
modules_to_save: list = []  # what trains whole and is saved beside the adapter: ["tok_embeddings", "output"]

# settings: the ranks
sequence_parallel_size: int | dict = 1  # ranks that share a sequence; {"ulysses": 8, "ring": 2} beyond the heads
deepspeed: str | None = None  # "zero1" to "zero3" cut the model over ranks; "zero3_offload", "zero3_hpz"; a JSON file
offload_directory: str | None = None  # a fast disk for what "zero3_offload" keeps; None is the memory of the CPU
hpz_partition_size: int | None = None  # ranks that share a copy of the weights under "zero3_hpz"; None: of a node
fsdp: str | None = None  # torch's FSDP2 in place of deepspeed: "full" cuts over all ranks, "hybrid" in each node
rank_timeout = 1800.0  # seconds to wait for a rank that does not come, before all end and say which

# settings: the data
data_path: str | list[str | dict] = "train.jsonl"  # file, "*.jsonl", "hub:NAME", list of {"path":, "weight":, ...}
data_format = "openai"  # what rows look like: "openai", "auto" (looks into them) or another of `tuner list-formats`
chat_template = "internlm2"  # how turns become tokens: the one of the model; "auto", "jinja": its tokenizer's own
loss_on = "assistant"  # every "assistant" turn; the "last" only; tool "calls" only; or the "thoughts" before a call
train_newline = False  # whether what stands behind an answer's end mark is trained: "\n", nothing in Llama 3
parallel_tool_calls = "template"  # several in a turn: "split" over turns, "join", "error", or the template's own way
max_length = 32768  # tokens in a pack, and at most in a conversation
too_long = "truncate"  # what happens to a longer conversation: "truncate", "split" or "drop"; counted in the ledger
on_bad_row = "raise"  # a row that cannot be read: "raise" stops, "skip" counts it and writes it to a file
pack = True  # put several conversations into one pack, where they cannot see each other
streaming = False  # True tokenises while training goes on, for sets too large to do so first; needs max_steps
stages: list[dict] | None = None  # [{"max_length": 4096, "share": 0.9}, ...]: lengths, data, RoPE and lr that change
cache_dir: str | None = None  # where tokenised data is kept; None is $TUNER_CACHE or ~/.cache/tuner

# settings: the optimisation
num_epochs = 3  # passes over the data
max_steps: int | None = None  # optimizer steps to stop after; None is all of the epochs
num_accumulation_steps = 8  # packs in an optimizer step
lr = 2e-4  # peak learning rate
lora_plus_ratio: float | None = None  # B's learning rate is so many times lr (LoRA+: 16); None: the same
optimizer = "adamw"  # or "adamw8bit": bitsandbytes' moments of 8 bits; with neither deepspeed nor fsdp
min_lr_ratio = 0.1  # share of the peak that the cosine ends at
warmup_ratio = 0.03  # share of the steps in which the learning rate climbs
betas = (0.9, 0.95)  # Adam's two decays
weight_decay = 0.0  # AdamW's, on matrices
max_grad_norm = 1.0  # the gradient is scaled down to this norm where it is longer
on_nonfinite = "skip"  # a step with a NaN or infinity: "skip" it, "rollback" to the last checkpoint, or "stop"
max_nonfinite_steps = 3  # so many such steps in a row end the run whatever on_nonfinite says
spike_factor: float | None = None  # a loss above so many times the median of 50 is as bad as a NaN; None: none is
seed = 0  # of the order of the data, of random weights and of dropout

# settings: what is written
log_interval = 10  # steps between log lines on the terminal; metrics.jsonl has every step
save_interval: int | None = 500  # steps between checkpoints; None saves only after the last step
keep_checkpoints: int | None = 2  # how many of the newest to keep; None keeps all
keep_every: int | None = None  # those after a multiple of so many steps are kept too
keep_best = False  # and the one before which the mean training loss, since the checkpoint before, was lowest
async_save = True  # write while training goes on, which waits only for a copy in this host's memory; False waits
copy_checkpoints_to: str | None = None  # a directory, such as on a disk for archives, that gets a copy of each
sample_interval = 100  # steps between sampled replies to the prompts; 0 is never
sample_prompts = ["请介绍一下你自己。", "What can you help me with?"]  # what the sampled replies answer
needle_interval = 0  # steps between heat maps of which sentences, hidden in long text, the model finds; 0 is never
needle_lengths = "1k,4k,32k"  # tokens of that text, k is 1,024; beyond max_length they show how far the model reaches
needle_depths = "0:100:25"  # where in it, in percent: FIRST:LAST:STEP, or a list such as "0,50,100"
needle_languages = "en,zh"  # of text and sentences
needle_haystack: list[str] = []  # text files to hide them in; none: made sentences

# assembly
tokenizer = dict(type=build_tokenizer, path=model_path)

train_dataset = dict(
    type=StageDatasets if stages else StreamedDataset if streaming else PackedDataset,
    shards=dict(
        type=StageShards if stages else build_stream if streaming else build_shards,
        path=data_path,
        data_format=data_format,
        chat_template=dict(
            type=Rendering,
            chat_template=chat_template,
            loss_on=loss_on,
            train_newline=train_newline,
            parallel_tool_calls=parallel_tool_calls,
        ),
        tokenizer=tokenizer,
        max_length=max_length,
        too_long=too_long,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
    ),
    max_length=max_length,
    seed=seed,
    pack=pack,
)

train_dataloader = dict(
    type=build_dataloader,
    dataset=train_dataset,
    stages=stages,
    num_accumulation_steps=num_accumulation_steps,
    num_epochs=num_epochs,
    max_steps=max_steps,
)

model = dict(
    type=SFT,
    llm=dict(
        type=build_llm,
        path=model_path,
        weights=weights,
        attention=attention,
        memory=dict(
            type=Memory,
            gradient_checkpointing=gradient_checkpointing,
            offload_activations=offload_activations,
            tile_tokens=tile_tokens,
        ),
        seed=seed,
        adapter=dict(
            type=LoRA,
            rank=lora_rank,
            alpha=lora_alpha,
            dropout=lora_dropout,
            variant=lora_variant,
            targets=lora_targets,
            modules_to_save=modules_to_save,
        ),
    ),
)

optim_wrapper = dict(
    optimizer=dict(type=adamw, kind=optimizer, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_grad_norm),
    lora_plus_ratio=lora_plus_ratio,
)

param_scheduler = dict(type=WarmupCosine, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio)

strategy = dict(
    type=build_strategy,
    deepspeed=deepspeed,
    offload_directory=offload_directory,
    hpz_partition_size=hpz_partition_size,
    fsdp=fsdp,
    precision=precision,
    sequence_parallel_size=sequence_parallel_size,
)

train_cfg = dict(
    type=TrainLoop,
    rank_timeout=rank_timeout,
    on_nonfinite=on_nonfinite,
    max_nonfinite_steps=max_nonfinite_steps,
    spike_factor=spike_factor,
)

custom_hooks = [
    dict(
        type=NeedleHook,
        interval=needle_interval,
        needles=dict(
            type=NeedleGrid,
            lengths=needle_lengths,
            depths=needle_depths,
            languages=needle_languages,
            haystack=needle_haystack,
            seed=seed,
        ),
        pack_tokens=max_length,
    ),
    dict(type=MetricsHook, interval=log_interval),
    dict(type=SampleChatHook, interval=sample_interval, prompts=sample_prompts),
    dict(
        type=CheckpointHook,
        interval=save_interval,
        keep=keep_checkpoints,
        keep_every=keep_every,
        keep_best=keep_best,
        async_save=async_save,
        copy_to=copy_checkpoints_to,
    ),
    dict(type=CurvesHook),
]
