"""Small networks: what claims train, how, and what a query tells of them.

- `models`, `tasks`, `vectors`: networks, the real data that each reads, and words as numbers;
- `training`, `methods`: by back-propagation or by queries, at rates in units of what trains;
- `estimates`, `judges`, `audits`, `steps`: what one claim each looks at (noise, judge, audited,
  memory).
"""
