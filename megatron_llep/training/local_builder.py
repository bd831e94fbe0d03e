"""Megatron's builder of GPT models, with local layers also in multi-token prediction.

Megatron's own makes these of its own local layers, which know neither sequence parallelism nor
multi-latent attention.
"""

from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_llep.compat.training import GPTModelBuilder, calculate_padded_vocab_size
from megatron_llep.integration.local_spec import build_local_block_spec, build_local_mtp_spec


class LocalGPTModelBuilder(GPTModelBuilder):
    """Megatron's builder, with local layers also in multi-token prediction."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One chunk of the model, as Megatron's builder makes it.

        Args:
            pg_collection: the model's process groups.
            pre_process: whether it has the embedding. Default: on the first stage.
            post_process: whether it has the output layer. Default: on the last stage.
            vp_stage: the virtual pipeline stage.
        """
        config = self._model_config
        transformer = config.transformer
        layers = build_local_block_spec(transformer, vp_stage)
        stages = {
            "vp_stage": vp_stage,
            "vp_size": transformer.virtual_pipeline_model_parallel_size,
        }
        if pre_process is None:
            pre_process = is_vp_first_stage(**stages) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(**stages) and is_pp_last_stage(pg_collection.pp)
        rows = config.vocab_size
        assert rows is not None
        if config.should_pad_vocab:
            rows = calculate_padded_vocab_size(
                rows, config.make_vocab_size_divisible_by, transformer.tensor_model_parallel_size
            )
        return GPTModel(
            config=transformer,
            transformer_layer_spec=layers,
            mtp_block_spec=build_local_mtp_spec(transformer, layers, vp_stage),
            vocab_size=rows,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **{name: getattr(config, name) for name in _SAME_IN_MODEL},
        )


_SAME_IN_MODEL = (
    *("fp16_lm_cross_entropy", "parallel_output", "share_embeddings_and_output_weights"),
    *("position_embedding_type", "rotary_percent", "rotary_base", "rope_scaling"),
    *("rope_scaling_factor", "seq_len_interpolation_factor", "scatter_embedding_sequence_parallel"),
)
