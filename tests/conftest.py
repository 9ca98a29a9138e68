"""Checks every jaxtyping shape and annotation of the package while tests run.

An int may stand where a float is annotated, as type checkers have it (PEP 484).
"""

import signal

import torch
from jaxtyping import install_import_hook

import tests.typecheck

# A shell's background job ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny models: a second thread only waits

install_import_hook("fewstep", f"{tests.typecheck.__name__}.checked")
