"""Kidger's solvers with networks inside: diffrax, optimistix, lineax."""

import equinox as eqx
import jax
import jax.numpy as jnp

from zoo.data import normal
from zoo.registry import model


class _Field(eqx.Module):
    net: eqx.nn.MLP

    def __init__(self):
        self.net = eqx.nn.MLP(2, 2, 16, 1, jax.nn.softplus, key=jax.random.key(0))

    def __call__(self, t, y, args):
        return self.net(y)


def _neural_ode(**how):
    import diffrax

    start, target = normal(4, 2), normal(4, 2, seed=3)

    def loss(field):
        def solve(y0):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field), diffrax.Tsit5(), t0=0.0, t1=1.0, dt0=0.1, y0=y0,
                saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 3)), **how,
            )  # fmt: skip
            return solution.ys[-1]

        return jnp.mean((jax.vmap(solve)(start) - target) ** 2)

    return _Field(), loss


@model("diffrax neural ODE, default adjoint, steps of one size", "diffrax")
def neural_ode():
    return _neural_ode()


@model("diffrax neural ODE, PIDController", "diffrax", tolerance=2e-3, slow=True)
def neural_ode_adaptive():
    import diffrax

    return _neural_ode(stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6))


@model("optimistix fixed point of a network (deep equilibrium)", "optimistix", tolerance=1e-3)
def fixed_point():
    import optimistix

    x, target = normal(4, 8), normal(4, 8, seed=3)
    net = eqx.nn.Linear(8, 8, key=jax.random.key(0))

    def loss(net):
        def equilibrium(x):
            step = lambda z, net: 0.3 * jnp.tanh(net(z)) + x  # noqa: E731
            solver = optimistix.FixedPointIteration(rtol=1e-5, atol=1e-5)
            return optimistix.fixed_point(step, solver, x, args=net).value

        return jnp.mean((jax.vmap(equilibrium)(x) - target) ** 2)

    return net, loss


@model("lineax solve with a matrix of features", "lineax", tolerance=1e-3)
def ridge():
    import lineax

    x, target = normal(16, 8), normal(16, seed=3)
    net = eqx.nn.MLP(8, 6, 16, 1, key=jax.random.key(0))

    def loss(net):
        features = jax.vmap(net)(x)
        gram = features.T @ features + 0.1 * jnp.eye(6)
        operator = lineax.MatrixLinearOperator(gram, lineax.positive_semidefinite_tag)
        weights = lineax.linear_solve(operator, features.T @ target).value
        return jnp.mean((features @ weights - target) ** 2)

    return net, loss
