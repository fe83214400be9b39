"""The claims of both papers, and some of our own, checked on two cores in minutes each.

A claim is a file here: its settings, what it measures, and how that is shown. The frame is `claim`,
how one is measured and kept, and `pages`, what their tables and figures share. What they measure on
lies on two benches, which know nothing of each other:

- `convex`: problems whose optimum and Hessian are known, so that a descent can be held against
  theory (residual, floors, rates);
- `networks`: small networks on real data, of which nothing is known (noise, bits, memory, audited,
  judge, budgets).
"""
