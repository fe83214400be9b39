"""Small convex problems whose optimum and Hessian are known, queries of them, descents on them."""
