"""The claims of both papers, and some of our own, checked on two cores in minutes each.

A claim is a module here: its settings, what it measures, and how that is shown. `claim` measures
any of them and stores what it finds; `pages` has what their tables and figures share. What they
measure on are two packages that do not import each other:

- `convex`: problems whose optimum and Hessian are known, so that a descent can be compared with
  theory (residual, floors, rates);
- `networks`: small networks on real data, of which nothing is known (noise, bits, memory, audited,
  judge, budgets).

`untuned` measures on both; `untuned_problems` says what, and `untuned_settings` how.
"""
