"""The paper's models as Hugging Face models. Needs the extra `hf`: pip install -e ".[hf]" in a clone.

Importing this registers the model with AutoConfig and AutoModelForCausalLM under the type "titans":

    import titans_pytorch.hf
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)
"""

import sys

from titans_pytorch.common.checks import missing

try:
    import transformers
except ImportError as error:
    needed = missing("titans_pytorch.hf", "transformers", "hf")
    if sys.argv[:1] == ["-m"]:  # a module of this package is run as a script: a line, no traceback
        sys.exit(str(needed))
    raise needed from error

from titans_pytorch.hf.cache import TitansCache
from titans_pytorch.hf.configuration import TitansHFConfig
from titans_pytorch.hf.modeling import TitansForCausalLM, TitansPreTrainedModel

__all__ = ["TitansCache", "TitansForCausalLM", "TitansHFConfig", "TitansPreTrainedModel"]

transformers.AutoConfig.register("titans", TitansHFConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(TitansHFConfig, TitansForCausalLM, exist_ok=True)
