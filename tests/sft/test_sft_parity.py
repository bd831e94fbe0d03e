"""Fine-tuning on packs: LLEP trains as plain expert parallelism does, in every layout.

Letters: S sequence length.
"""

from argparse import Namespace
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from megatron.core.datasets.utils import Split
from megatron.training import global_vars
from torch.utils.data import default_collate

from megatron_llep.compat import MEGATRON
from megatron_llep.training.sft.dataset import SFTDataset, SFTDatasetConfig
from megatron_llep.training.sft.tokens import TokenFile
from megatron_llep.training.step import forward_step
from support.latent_attention import LATENT
from support.layout import Layout
from support.llep import assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.routing import Routing
from support.training import VOCABULARY, Run, train

S = 32
STEPS, LONG = 8, 20


@cache
def make_dataset() -> SFTDataset:
    """Conversations of 4 to 32 tokens, of which a second half is answer."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, S + 1, 400)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    ids = draw.integers(0, VOCABULARY, ends[-1] + 1, dtype=np.int32)
    middles = np.repeat(starts + lengths // 2, lengths)
    file = TokenFile(
        path="random",
        inputs=ids[:-1],
        labels=ids[1:],
        trained=np.arange(ends[-1]) >= middles,
        starts=starts,
        ends=ends,
        lines=np.arange(1, 401),
    )
    config = SFTDatasetConfig(
        random_seed=1,
        sequence_length=S,
        blend=(["random"], None),
        split="1,0,0",
        chat=Namespace(pad_id=0),
    )
    return SFTDataset(file, "random", np.arange(400), None, Split.train, config)


def make_batch(run, step, micro_batch):
    dataset, size = make_dataset(), run.micro_batch_size
    first = (step * run.micro_batches + micro_batch) * size
    return default_collate([dataset[(first + i) % len(dataset)] for i in range(size)])


def step_on_pack(iterator, model):
    """The script's own step, with a report as the tests' training has it."""
    output, compute_loss = forward_step(iterator, model, packed=True)

    def report_mean(losses):
        loss, num_tokens, report = compute_loss(losses)
        total, count = report["lm loss"]
        return loss, num_tokens, {"loss": total / count}

    return output, report_mean


def make_run(layout, micro_batch_size=2, steps=STEPS, **settings):
    return Run(
        layout=layout,
        routing=Routing("hot", ranks=layout.ep),
        steps=steps,
        micro_batch_size=micro_batch_size,
        sequence_length=S,
        config={"calculate_per_token_loss": True, **settings},
        tokens=make_batch,
        forward_step=step_on_pack,
    )


def set_megatron_arguments(run):
    """What the step reads of Megatron's global arguments."""
    args = Namespace(
        mtp_num_layers=None,
        create_attention_mask_in_dataloader=False,
        context_parallel_size=1,
        micro_batch_size=run.micro_batch_size,
        seq_length=S,
        pipeline_model_parallel_size=run.layout.pp,
        virtual_pipeline_model_parallel_size=run.layout.vpp,
        check_for_nan_in_loss_and_grad=True,
        check_for_spiky_loss=False,
        timing_log_level=0,
        timing_log_option="minmax",
    )
    global_vars.unset_global_variables()
    global_vars.set_args(args)
    global_vars._set_timers(args)


CASES = {
    2: {
        "tp2 ep2": make_run(Layout(tp=2, ep=2, etp=1), micro_batch_size=1),
        "ep2": make_run(Layout(ep=2), steps=LONG),
        "window and sinks": make_run(
            Layout(ep=2),
            window_size=(5, 0),
            softmax_type="learnable",
            window_attn_skip_freq=2,
        ),
    },
    4: {
        "tp2 etp2 ep2": make_run(Layout(tp=2, ep=2, etp=2), micro_batch_size=1),
        "pp2 ep2": make_run(Layout(pp=2, ep=2), micro_batch_size=1),
    },
}
if MEGATRON >= (0, 19):  # an older one has it with Transformer Engine alone
    CASES[2]["latent attention"] = make_run(Layout(ep=2), **LATENT)


@pytest.fixture(scope="module")
def single():
    """Losses of one process, with one pack a micro-batch."""

    def work(rank, size):
        run = replace(make_run(Layout(), micro_batch_size=1), routing=Routing("hot"))
        set_megatron_arguments(run)
        return train(run).losses

    return run_ranks(work, 1)[0]


@pytest.mark.parametrize("world_size", CASES)
def test_llep_fine_tunes_as_plain_in_every_layout_as_one_process(world_size, single):
    def work(rank, size):
        for name, run in CASES[world_size].items():
            try:
                set_megatron_arguments(run)
                plain = train(run)
                lending = train_with_llep(run)
                assert_same_run(lending, plain)
                assert lending.observed.transfers > 0
                if run.micro_batch_size == 1:
                    assert plain.losses == pytest.approx(single, rel=1e-5)
            except BaseException as error:
                error.add_note(f"case: {name}")
                raise

    run_ranks(work, world_size, timeout=240)
