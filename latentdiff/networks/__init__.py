"""The networks of diffusers, transformers and open_clip, behind the protocols of this project."""

import logging

# diffusers imports torchao wherever it is installed, and both write lines about each other's versions
for _name in ("diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
