"""What a rank keeps between two reports."""

import numpy as np

from megatron_llep.metrics.recorded import Recorded


def test_models_of_unlike_sizes_may_train_in_one_process():
    recorded, other = Recorded(), Recorded()
    recorded.add_micro_batch(0, {}, experts=np.array([4, 2]))
    recorded.add_micro_batch(0, {}, experts=np.array([2, 2, 6, 0]))
    other.add_micro_batch(0, {}, experts=np.array([3, 2, 0]))
    recorded.add_all(other)
    assert recorded.num_experts == 4
    assert recorded.experts_of_layer(0).tolist() == [3, 2, 2, 0]
