"""Experts with adapters (LoRA) train as under plain expert parallelism with the same adapters."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_llep import convert_model
from megatron_llep.config import LLEPConfig
from megatron_llep.layer import LLEPMoELayer
from support.comparison import get_relative_difference
from support.layout import Layout, use_layout
from support.llep import EAGER, train_with_llep
from support.lora import Lora
from support.parity import Case, compare_all
from support.ranks import run_ranks
from support.routing import Routing
from support.training import Chunks, Run, build_model, make_config, make_tokens

EP2 = Layout(ep=2)
GROUPED_MM = replace(EAGER, expert_gemm="grouped_mm")
REFETCH = replace(EAGER, foreign_weights="refetch")
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000}


def after(lora: Lora, layout: Layout = EP2, **settings) -> Run:
    """Adapters are put in when LLEP is on already."""
    return Run(layout=layout, prepare=lora.add, **settings)


def before(lora: Lora, layout: Layout = EP2, **settings) -> Run:
    return Run(layout=layout, build=lora.build, **settings)


def test_in_both_orders():
    trained = Lora(frozen=False, dim=3, alpha=2)
    compare_all(
        {
            "after": Case(after(Lora())),
            "before, hot": Case(before(Lora(), routing=Routing("hot"))),
            "trained base": Case(after(trained, config={"add_bias_linear": True})),
            "one linear of one layer": Case(after(Lora(targets=("linear_fc2",), layers=(1,)))),
            "recomputed": Case(after(Lora(), config=RECOMPUTE), REFETCH),
        },
    )


def test_in_grouped_gemms():
    compare_all(
        {
            "after": Case(after(Lora()), GROUPED_MM),
            "before": Case(
                before(Lora(frozen=False), config={"add_bias_linear": True}), GROUPED_MM
            ),
            "split": Case(after(Lora("split")), GROUPED_MM),
            "peft, refetched": Case(
                after(Lora("peft")), replace(GROUPED_MM, foreign_weights="refetch")
            ),
        },
    )


@pytest.mark.slow
def test_of_other_kinds_and_in_other_trainings():
    compare_all(
        {
            f"{name}, {order.__name__}, {'frozen' if frozen else 'trained'}": Case(
                order(replace(lora, frozen=frozen), **settings), llep
            )
            for name, (lora, llep, settings) in {
                "split": (Lora("split"), REFETCH, {}),
                "magnitude": (Lora("magnitude"), EAGER, {}),
                "peft": (Lora("peft"), EAGER, {}),
                "overlapped": (Lora(), EAGER, {"ddp": OVERLAP, "steps": 4}),
                "grouped, overlapped": (Lora(), GROUPED_MM, {"ddp": OVERLAP, "steps": 4}),
                "grouped, recomputed": (Lora(), GROUPED_MM, {"config": RECOMPUTE}),
                "one rank": (Lora(), REFETCH, {"routing": Routing("one_rank"), "steps": 4}),
                "starved": (Lora(), GROUPED_MM, {"routing": Routing("starved"), "steps": 4}),
            }.items()
            for order in (before, after)
            for frozen in (True, False)
        },
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "llep"),
    [
        (Layout(tp=2, ep=2), EAGER),
        (Layout(tp=2, ep=2), GROUPED_MM),
        (Layout(ep=4), replace(EAGER, scatter_from=2)),
        (Layout(ep=2, dp=4), REFETCH),
        (Layout(pp=2, ep=2), EAGER),
    ],
    ids=str,
)
def test_in_other_layouts(layout, llep):
    overlap = {"ddp": OVERLAP} if layout.dp else {}
    compare_all(
        {
            f"{order.__name__}, {'frozen' if frozen else 'trained'}": Case(
                order(Lora(frozen=frozen), layout, **overlap), llep
            )
            for order in (before, after)
            for frozen in (True, False)
        },
        timeout=400,
    )


@pytest.mark.slow
def test_in_bf16_with_adapters_in_fp32():
    dtype = torch.bfloat16
    config = {"bf16": True, "params_dtype": dtype, "pipeline_dtype": dtype}
    optimizer = {"bf16": True, "params_dtype": dtype}
    run = after(
        Lora(dtype=torch.float32), routing=Routing("hot"), config=config, optimizer=optimizer
    )
    tolerances = {"loss_tolerance": 5e-3, "gradient_tolerance": 2e-2}
    compare_all({"fp32 around bf16": Case(run, **tolerances)})


def test_only_what_trains_comes_home(monkeypatch):
    """An expert leaves with its adapters; of a frozen one these alone have gradients."""

    def work(rank, size):
        sent: list[int] = []
        monkeypatch.setattr(
            LLEPMoELayer, "_note_bytes", lambda layer, out, into: sent.append(out + into)
        )
        H, F, r = 32, 64, 4
        adapters = 4 * r * (H + 2 * F + F + H)
        expert = 4 * (3 * H * F) + adapters
        run = after(Lora(layers=(0,)), steps=1, micro_batches=2, config={"num_layers": 1})
        transfers = train_with_llep(run).observed.transfers
        assert transfers > 0
        assert sum(sent) == transfers * (expert + adapters)

    run_ranks(work, 2)


def forward(model: torch.nn.Module, run: Run, rank: int) -> torch.Tensor:
    tokens = make_tokens(run, 0, rank)[:, :-1]
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def experts_of(chunks: Chunks) -> torch.nn.Module:
    return chunks[0].decoder.layers[1].mlp.experts


def add_other_rank(chunks: Chunks, rank: int) -> None:
    Lora(dim=4 + rank).add(chunks)


def add_other_scale(chunks: Chunks, rank: int) -> None:
    Lora(alpha=4 + rank).add(chunks)


def add_on_one_rank(chunks: Chunks, rank: int) -> None:
    if rank == 1:
        Lora().add(chunks)


def add_to_one_expert(chunks: Chunks, rank: int) -> None:
    experts = torch.nn.Module()
    experts.local_experts = experts_of(chunks).local_experts[:1]
    Lora().add_to(experts)


def add_hooks(chunks: Chunks, rank: int) -> None:
    Lora("same").add(chunks)


def add_a_buffer(chunks: Chunks, rank: int) -> None:
    for expert in experts_of(chunks).local_experts:
        expert.linear_fc1.register_buffer("scale", torch.ones(1))


def add_magnitudes(chunks: Chunks, rank: int) -> None:
    Lora("magnitude").add(chunks)


def replace_linears(chunks: Chunks, rank: int) -> None:
    for expert in experts_of(chunks).local_experts:
        expert.linear_fc1 = torch.nn.Sequential(expert.linear_fc1)


REFUSED: dict[str, tuple[Callable[[Chunks, int], None], LLEPConfig, str]] = {
    "rank of the adapters": (
        add_other_rank,
        EAGER,
        r"in layer 1, .* on rank 0 than on rank 1 \(.*dim=4 .*dim=5 .* give all ranks the same",
    ),
    "scale": (add_other_scale, EAGER, r"alpha=4; .*alpha=5\).* give all ranks the same adapters"),
    "on one rank": (add_on_one_rank, EAGER, "give all ranks the same adapters"),
    "on one expert": (
        add_to_one_expert,
        EAGER,
        r"not alike: in experts.local_experts.0 .* same adapters or none.*in layer 2\): rank 0 ",
    ),
    "hooks": (add_hooks, EAGER, r"experts.local_experts.0.linear_fc1.*has a gradient hook"),
    "a buffer": (add_a_buffer, EAGER, r"local_experts.0.linear_fc1.scale is a buffer"),
    "DoRA in grouped GEMMs": (add_magnitudes, GROUPED_MM, r"MagnitudeLinear, has adapter.weight_m"),
    "a wrapper that is not known": (replace_linears, GROUPED_MM, r"linear layers, not of Seq"),
}


def test_what_cannot_be_lent_is_refused_by_all_ranks_alike():
    def work(rank, size):
        run = Run(layout=EP2)
        messages = {}
        with use_layout(EP2):
            for name, (change, llep, match) in REFUSED.items():
                chunks = convert_model(build_model(make_config(run), run), llep)
                change(chunks, rank)
                with pytest.raises(ValueError, match=match) as error:
                    forward(chunks[0], run, rank)
                messages[name] = str(error.value)
        return messages

    one, other = run_ranks(work, 2)
    assert one == other
    assert "rank 0 refuses it; so do ranks [1]" in one["hooks"]


def test_what_cannot_be_lent_is_refused_at_conversion_if_it_is_there():
    def work(rank, size):
        run = Run(layout=EP2)
        with use_layout(EP2):
            chunks = build_model(make_config(run), run)
            if rank == 1:
                add_to_one_expert(chunks, rank)
            with pytest.raises(ValueError, match=r"not alike: .* rank 1 refuses it"):
                convert_model(chunks, EAGER)

    run_ranks(work, 2)


def take_off(chunks: Chunks) -> None:
    for layer in chunks[0].decoder.layers:
        for expert in layer.mlp.experts.local_experts:
            expert.linear_fc1 = expert.linear_fc1.to_wrap
            expert.linear_fc2 = expert.linear_fc2.to_wrap


def test_adapters_come_and_go_and_what_is_saved_is_that_of_plain_megatron():
    def work(rank, size):
        run = Run(layout=EP2)
        with use_layout(EP2), torch.no_grad():
            plain = build_model(make_config(run), run)
            for llep in (EAGER, GROUPED_MM):
                lending = convert_model(build_model(make_config(run), run), llep)
                for change in (list, Lora().add, take_off):
                    both = (plain, lending)
                    for chunks in both:
                        change(chunks)
                    expected, output = (forward(chunks[0], run, rank) for chunks in both)
                    assert get_relative_difference(output, expected) <= 1e-5
                    ours, theirs = ([*dict(chunks[0].named_parameters())] for chunks in both)
                    assert ours == theirs
                    ours, theirs = (chunks[0].state_dict().keys() for chunks in both)
                    assert ours == theirs

    run_ranks(work, 2)
