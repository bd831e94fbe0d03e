"""Changes without which ``megatron.training.pretrain`` does not start.

1. ``initialize_megatron`` asserts that CUDA is available unless told ``allow_no_cuda=True``, and
   ``pretrain`` never tells it.
2. ``compile_helpers`` runs ``make`` in Megatron's folder. The wheel of megatron-core carries the
   compiled helper and no Makefile, so there is nothing to make and the run would end.
3. Latent experts are projected with a linear layer of Transformer Engine's.
"""

import functools
import importlib.util
from pathlib import Path

from megatron_llep.device.cpu import is_cpu_device_installed


def prepare_megatron_training() -> None:
    """Import ``megatron.training`` and make ``pretrain`` able to start here.

    The first change is made only where the CPU device is installed, the second only where
    Megatron came as a wheel, the third only where Transformer Engine is missing. A second call
    does nothing.
    """
    import megatron.core.datasets.utils as dataset_utils
    import megatron.training.training as training

    folder = Path(dataset_utils.__file__).parent
    is_compiled = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if is_compiled and not (folder / "Makefile").exists():
        dataset_utils.compile_helpers = _compile_nothing
    initialize = training.initialize_megatron
    if is_cpu_device_installed() and not isinstance(initialize, functools.partial):
        training.initialize_megatron = functools.partial(initialize, allow_no_cuda=True)
    # It imports Megatron.
    from megatron_llep.device.latent_projection import prepare_latent_projections

    prepare_latent_projections()


def _compile_nothing() -> None:
    return None
