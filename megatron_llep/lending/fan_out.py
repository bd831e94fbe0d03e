"""How an expert reaches several borrowers: whole, by one send each, or in shards.

Letters: W numbers in an expert's weights, k ranks that borrow it, t nodes other than the home's
that do, B bytes a second of a link.

*On one node*. Direct: the home sends W to each of the k. Scatter-gather: it sends a shard of about
W / k to each, and the borrowers then send each other theirs, in a second exchange after the first.
Gradients take the same way back: borrowers send each other shards of their gradients, each adds up
its own shard over the borrowers, and sends the sum home. Numbers that cross one rank's link, each
way:

                      home sends    borrower receives    borrower sends    one after another
    direct            k W           W                    0                 k W
    scatter-gather    W             W                    (k-1)/k W         W + (k-1)/k W < 2 W

So shards save (k - 2 + 1/k) W / B seconds where the home's link is the bottleneck (W/2 for two
borrowers, 4/3 W for three, about k W for many), less one more exchange's latency for all ranks. In
total the same number of bytes crosses.

*To other nodes* an expert crosses once a node, however many ranks borrow it there: these get a part
each, and put it together inside, in an exchange that does not leave the node. Their gradients are
summed inside before they cross. From `scatter_from` nodes on the expert leaves its own node once
only: the home sends each of the t nodes a shard, the nodes send each other theirs, and then it is
put together inside. What crosses a node's link, each way, for one of the borrowing nodes:

                      home's node sends    a node receives    a node sends
    direct            t W                  W                  0
    scatter-gather    W                    W                  (t-1)/t W

There are up to three exchanges then: from the home, between nodes, inside nodes.
`planner.loops.pieces` lists what goes where.
"""

SCATTER_FROM = 3
"""For two borrowers the saving is small: a second exchange, in which every rank of the group takes
part, costs about as much for experts of usual size inside a node."""
