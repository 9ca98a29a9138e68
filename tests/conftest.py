"""Checks every jaxtyping shape and annotation of the package while tests run."""

from jaxtyping import install_import_hook

install_import_hook("fewstep", "beartype.beartype")

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread only waits
