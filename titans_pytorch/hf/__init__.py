"""The family as Hugging Face models: needs `pip install titans-pytorch[hf]`.

Importing this registers the model with AutoConfig and AutoModelForCausalLM under the type "titans":

    import titans_pytorch.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

try:
    import transformers
except ImportError as error:
    raise ImportError("titans_pytorch.hf needs transformers: pip install 'titans-pytorch[hf]'") from error

from .configuration import TitansHFConfig
from .modeling import TitansCache, TitansForCausalLM, TitansPreTrainedModel

__all__ = ["TitansCache", "TitansForCausalLM", "TitansHFConfig", "TitansPreTrainedModel"]

transformers.AutoConfig.register("titans", TitansHFConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(TitansHFConfig, TitansForCausalLM, exist_ok=True)
