"""Lending waits for gathered parameters by DDP's own hooks, and leaves those of others alone."""

from dataclasses import replace

import torch

from chaos.test_late_returns import GATHER
from megatron_llep.layer import LLEPMoELayer
from support.llep import EAGER, assert_same_run, train_with_llep
from support.ranks import run_ranks
from support.training import Chunks, train


def test_a_hook_that_reads_its_input():
    def work(rank, size):
        sizes: list[int] = []

        def read_input(module: torch.nn.Module, args: tuple) -> None:
            sizes.append(args[0].shape[-1])

        def watch(chunks: Chunks) -> None:
            for layer in chunks[0].modules():
                if isinstance(layer, LLEPMoELayer):
                    for module in layer.experts.modules():
                        module.register_forward_pre_hook(read_input)

        run = replace(GATHER, prepare=watch)
        plain = train(GATHER)
        for expert_gemm in ("megatron", "grouped_mm"):
            del sizes[:]
            lending = train_with_llep(run, replace(EAGER, expert_gemm=expert_gemm))
            assert lending.observed.transfers > 0
            assert_same_run(lending, plain)
            assert sizes

    run_ranks(work, GATHER.layout.world_size, timeout=120)
