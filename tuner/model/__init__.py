"""Models: importing this package teaches transformers' Auto classes InternLM2, with no remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from tuner.model import attention
from tuner.model.internlm2 import tokenization
from tuner.model.internlm2.configuration import InternLM2Config
from tuner.model.internlm2.modeling import InternLM2ForCausalLM, InternLM2Model
from tuner.model.internlm2.reward import InternLM2ForRewardModel

AutoConfig.register("internlm2", InternLM2Config, exist_ok=True)
# The published auto_map gives AutoModel the causal LM, or the reward model where there is one; `architectures` decides.
AutoModel.register(InternLM2Config, (InternLM2ForCausalLM, InternLM2Model, InternLM2ForRewardModel), exist_ok=True)
AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(InternLM2Config, InternLM2ForRewardModel, exist_ok=True)
attention.register()
tokenization.register()
