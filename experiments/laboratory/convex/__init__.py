"""Small convex problems: what is minimised, how, and what rounding does to a query of it.

- `problems`: quadratics and logistic regressions, with their optimum and Hessian;
- `descents`: methods, at rates in units of the Hessian;
- `residuals`: what rounding the ends of a query adds to its estimate.
"""
