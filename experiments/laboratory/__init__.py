"""The claims of both papers, and some of our own, checked on two cores in minutes each.

Every file here is a claim, but for the frame: `claim` (what one is, how it is measured and kept)
and `pages` (what their tables and figures share). Claims stand on two benches, which know nothing
of each other:

- `convex`: problems whose optimum and Hessian are known, so that a descent is held against theory,
  and told its rates in units of the Hessian (residual, floors, rates);
- `networks`: small networks and real data, of which nothing is known, trained at rates in units of
  the numbers that train (noise, bits, budgets, audited, judge, memory).
"""
