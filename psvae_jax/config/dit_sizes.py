"""Sizes of the diffusion transformer, by name.

B, L and XL are DiT's trunks (arXiv 2212.09748, without its patches: a latent
is a token) with RAE's head (arXiv 2510.11690). 0.65B and 1.7B have the
parameter budgets of the paper's two generators (section 4.1: 653 M with the
head; figure 10: 1708 M), whose trunks are language models and ours are not.
"tiny" is the embedded miniature's.
"""

from typing import Any

_RAE_HEAD = dict(head_width=2048, head_depth=2, head_num_heads=16)
_TWO_THIRDS = 8 / 3  # SwiGLU's three matrices cost what a plain MLP's two do

SIZES: dict[str, dict[str, Any]] = {
  # Without a head: a trunk of 192 channels carries 24 of noise by itself.
  "tiny": dict(
    width=192,
    depth=6,
    num_heads=3,
    mlp_ratio=_TWO_THIRDS,
    head_depth=0,
  ),
  "B": dict(
    width=768, depth=12, num_heads=12, mlp_ratio=_TWO_THIRDS, **_RAE_HEAD
  ),
  "L": dict(
    width=1024, depth=24, num_heads=16, mlp_ratio=_TWO_THIRDS, **_RAE_HEAD
  ),
  "XL": dict(
    width=1152, depth=28, num_heads=16, mlp_ratio=_TWO_THIRDS, **_RAE_HEAD
  ),
  "0.65B": dict(
    width=1152, depth=20, num_heads=16, mlp_ratio=_TWO_THIRDS, **_RAE_HEAD
  ),
  "1.7B": dict(
    width=2048, depth=20, num_heads=16, mlp_ratio=_TWO_THIRDS, **_RAE_HEAD
  ),
}
