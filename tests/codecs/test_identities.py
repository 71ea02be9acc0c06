"""The logit identities, proved symbolically: each codec's own, the pipeline's frame, and the extremal case of B4."""

import pytest
import sympy as sp

from sphkv_compile.codecs import CODECS
from sphkv_compile.codecs.rotation import rotation


def is_zero(expression):
    return sp.simplify(sp.expand_trig(sp.expand(expression))) == 0


def angles(name, count):
    return sp.symbols(f"{name}1:{count + 1}", real=True)


def dot(u, v):
    return sum(a * b for a, b in zip(u, v))


def prove_axis_angles():
    """I4: the cosines to the axes of any orthonormal frame; here a general rotation of space, in Cayley's form."""
    x, y, z = sp.symbols("x y z", real=True)
    skew = sp.Matrix([[0, x, y], [-x, 0, z], [-y, -z, 0]])
    frame = (sp.eye(3) - skew) * (sp.eye(3) + skew).inv()
    q, k = sp.Matrix(angles("q", 3)), sp.Matrix(angles("k", 3))
    size_q, size_k = sp.sqrt(dot(q, q)), sp.sqrt(dot(k, k))
    cosines = dot(frame * q / size_q, frame * k / size_k)
    assert is_zero(size_q * size_k * cosines - dot(q, k))


def prove_pairs():
    """I1, with RoPE: it adds (m - n) omega to the difference of phases."""
    rho, amplitude, theta, phi, omega, m, n = sp.symbols("rho a theta phi omega m n", real=True)

    def rope(position, length, angle):
        turn = position * omega
        plane = sp.Matrix([[sp.cos(turn), -sp.sin(turn)], [sp.sin(turn), sp.cos(turn)]])
        return plane * sp.Matrix([length * sp.cos(angle), length * sp.sin(angle)])

    logit = dot(rope(m, amplitude, phi), rope(n, rho, theta))
    assert is_zero(logit - amplitude * rho * sp.cos(phi - theta + (m - n) * omega))


def prove_chain():
    """I2: the last step is a plane; each step before it wraps a direction whose cosine F is whatever it is."""
    a, b = angles("a", 3), angles("b", 3)
    u, w = angles("u", 3), angles("w", 3)  # the rest of the direction, of any length of chain
    wrapped = dot([sp.cos(a[0]), *(sp.sin(a[0]) * x for x in u)], [sp.cos(b[0]), *(sp.sin(b[0]) * x for x in w)])
    assert is_zero(wrapped - (sp.cos(a[0]) * sp.cos(b[0]) + sp.sin(a[0]) * sp.sin(b[0]) * dot(u, w)))

    def vector(chain):
        parts, reach = [], sp.Integer(1)
        for angle in chain:
            parts.append(reach * sp.cos(angle))
            reach *= sp.sin(angle)
        return [*parts, reach]

    cosine = sp.cos(a[2] - b[2])
    for i in (1, 0):
        cosine = sp.cos(a[i]) * sp.cos(b[i]) + sp.sin(a[i]) * sp.sin(b[i]) * cosine
    assert is_zero(dot(vector(a), vector(b)) - cosine)


def prove_tree():
    """I3: one join of any two parts, and a tree of two leaves."""
    alpha, beta = sp.symbols("alpha beta", real=True)
    u, w = angles("u", 4), angles("w", 4)

    def join(angle, left, right):
        return [*(sp.cos(angle) * x for x in left), *(sp.sin(angle) * x for x in right)]

    joined = dot(join(alpha, u[:2], u[2:]), join(beta, w[:2], w[2:]))
    cos, sin = sp.cos(alpha) * sp.cos(beta), sp.sin(alpha) * sp.sin(beta)
    assert is_zero(joined - (cos * dot(u[:2], w[:2]) + sin * dot(u[2:], w[2:])))
    phi, theta = angles("phi", 2), angles("theta", 2)
    leaves = [[(sp.cos(angle), sp.sin(angle)) for angle in side] for side in (phi, theta)]
    whole = dot(join(alpha, *leaves[0]), join(beta, *leaves[1]))
    assert is_zero(whole - (cos * sp.cos(phi[0] - theta[0]) + sin * sp.cos(phi[1] - theta[1])))


PROOFS = {"axis_cosine": prove_axis_angles, "pair_polar": prove_pairs, "chain": prove_chain, "tree": prove_tree}


@pytest.mark.parametrize("name", CODECS)
def test_identity_of_the_codec(name):
    PROOFS[name]()
    assert CODECS[name].identity and CODECS[name].bound


@pytest.mark.parametrize("dim", [8, 12])
def test_frame_of_the_pipeline(dim):
    """I5: q.k = q.a + H(s q) . H((k - a) / s), with the package's own H at a power of two and at a Paley order."""
    signs = sp.Matrix(dim, dim, lambda i, j: 1 if rotation(dim, 1)[i, j] > 0 else -1)
    q, k, a = (sp.Matrix(angles(name, dim)) for name in "qka")
    s = sp.Matrix(sp.symbols(f"s1:{dim + 1}", positive=True))
    query = signs * q.multiply_elementwise(s)
    key = signs * (k - a).multiply_elementwise(s.applyfunc(lambda x: 1 / x))
    assert sp.expand(dot(q, k) - dot(q, a) - dot(query, key) / dim) == 0


def test_distance_of_a_pair_from_its_code():
    """The root in B1 is the exact distance between two points of a plane."""
    rho, rho_hat, theta, theta_hat = sp.symbols("rho rhoh theta thetah", real=True)
    distance = (rho * sp.cos(theta) - rho_hat * sp.cos(theta_hat)) ** 2
    distance += (rho * sp.sin(theta) - rho_hat * sp.sin(theta_hat)) ** 2
    stated = (rho - rho_hat) ** 2 + 4 * rho * rho_hat * sp.sin((theta - theta_hat) / 2) ** 2
    assert is_zero(distance - stated)


def test_extremal_case_of_total_variation():
    """B4: raising a group of mass m by w moves most mass at m = 1 / (1 + e^(w/2)), and then tanh(w/4)."""
    m, w = sp.symbols("m w", positive=True)
    moved = m * sp.exp(w) / (1 - m + m * sp.exp(w)) - m
    best = 1 / (1 + sp.exp(w / 2))
    assert sp.simplify(sp.diff(moved, m).subs(m, best)) == 0
    assert sp.simplify(sp.diff(moved, m, 2).subs(m, best).subs(w, 1)) < 0
    assert sp.simplify((moved.subs(m, best) - sp.tanh(w / 4)).rewrite(sp.exp)) == 0
