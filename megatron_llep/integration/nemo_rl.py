"""NeMo-RL: its Megatron policy with LLEP, in the process that launches the workers.

    setup(..., policy_factory=llep_policy())

Settings stand under `policy.megatron_cfg.model_overrides.llep`; a worker without LLEP refuses them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_llep.integration.frameworks import find_seam, missing_seam

_PACKAGE = "nemo-rl"
_REGISTRY = "nemo_rl.distributed.ray_actor_environment_registry"
_PLAIN = "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"
WORKER = "megatron_llep.integration.nemo_rl_worker.LLEPPolicyWorker"


def llep_policy(policy: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """NeMo-RL's Policy, whose workers train with LLEP: for `policy_factory` of GRPO's `setup`.

    Args:
        policy: in the place of Policy, such as one of its subclasses, or a function that makes one.

    Raises:
        SeamError: this version of NeMo-RL does not start workers as was tried.
    """
    if policy is None:
        policy = find_seam(_PACKAGE, "nemo_rl.models.policy.lm_policy", "Policy")
    environments = find_seam(_PACKAGE, _REGISTRY, "ACTOR_ENVIRONMENT_REGISTRY")
    if _PLAIN not in environments:
        raise missing_seam(_PACKAGE, f"environment of {_PLAIN}")
    # NeMo-RL keeps one for each kind of worker; this kind needs megatron_llep in it, too.
    environments[WORKER] = environments[_PLAIN]
    return partial(policy, worker_extension_cls_fqn=WORKER)
