"""NeMo-RL's Megatron policy worker with LLEP; see `nemo_rl.py`."""

from typing import Any

from megatron_llep.integration.convert import convert_model
from megatron_llep.integration.frameworks import find_seam, missing_seam, take_settings
from megatron_llep.integration.read_metrics import read_metrics
from megatron_llep.integration.release_buffers import release_buffers

_PACKAGE = "nemo-rl"
_Plain: Any = find_seam(
    _PACKAGE,
    "nemo_rl.models.policy.workers.megatron_policy_worker",
    "MegatronPolicyWorkerImpl",
)
for _name in ("train", "finish_train_step", "offload_before_refit"):
    if not hasattr(_Plain, _name):
        raise missing_seam(_PACKAGE, f"MegatronPolicyWorkerImpl.{_name}")


class LLEPPolicyWorkerImpl(_Plain):
    """Converts the model when it is built and loaded; adds the metrics to those of MoE layers."""

    def __init__(self, config: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        megatron = dict(config["megatron_cfg"])
        overrides = dict(megatron.get("model_overrides") or {})
        llep = take_settings(overrides, "policy.megatron_cfg.model_overrides")
        megatron["model_overrides"] = overrides
        super().__init__({**config, "megatron_cfg": megatron}, *args, **kwargs)
        if getattr(self, "model", None) is None:
            raise missing_seam(_PACKAGE, "MegatronPolicyWorkerImpl.model")
        # It is wrapped and in the optimizer; parameters stay as they are.
        convert_model([self.model], llep)

    def train(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A step, and what its plans did."""
        return _with_metrics(super().train(*args, **kwargs))

    def finish_train_step(self) -> dict[str, Any]:
        """As `train`, where micro-batches are given one by one."""
        return _with_metrics(super().finish_train_step())

    def offload_before_refit(self) -> Any:
        """Make room for the weights that go to the rollout engine."""
        release_buffers(self.model)
        return super().offload_before_refit()


def _with_metrics(results: dict[str, Any]) -> dict[str, Any]:
    metrics = read_metrics()  # all ranks
    if metrics:  # NeMo-RL logs them under "moe/"
        results.setdefault("moe_metrics", {}).update(
            {name.removeprefix("moe/"): value for name, value in metrics.items()}
        )
    return results


_ray: Any = find_seam("nemo-rl", "ray")
_environment: Any = find_seam(
    _PACKAGE, "nemo_rl.models.policy.utils", "get_runtime_env_for_policy_worker"
)


@_ray.remote(runtime_env=_environment("megatron_policy_worker"))
class LLEPPolicyWorker(LLEPPolicyWorkerImpl):
    """The Ray actor."""
