"""The hooks that a config may name, in one place."""

from tuner.engine.curves import CurvesHook
from tuner.engine.metrics import MetricsHook
from tuner.engine.needle import NeedleHook
from tuner.engine.sample_chat import SampleChatHook
from tuner.engine.saving import CheckpointHook

__all__ = ["CheckpointHook", "CurvesHook", "MetricsHook", "NeedleHook", "SampleChatHook"]
