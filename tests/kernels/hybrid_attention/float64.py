"""The operator and its gradients in float64 numpy, head by head, by hand."""

import numpy as np

from arflow_jax.kernels.hybrid_attention.cases import Case

NAMES = ("q", "k", "v", "log_gate", "state", "output_gate")


def inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
  """Random operands, and weights `w` and `w_state` of a scalar loss; float32.

  The loss is sum(out w) + sum(final state w_state).
  """
  rs = np.random.RandomState(seed)
  tokens = (case.batch, case.images * case.tokens)
  width = case.heads * case.head
  gates = rs.standard_normal((*tokens, case.heads))
  memory = (case.batch, case.heads, case.head, case.head)
  drawn = {
    "q": rs.standard_normal((*tokens, width)),
    "k": rs.standard_normal((*tokens, width)),
    "v": rs.standard_normal((*tokens, width)),
    "log_gate": -np.log1p(np.exp(-gates)) / 16,
    "state": rs.standard_normal(memory),
    "output_gate": rs.standard_normal((*tokens, width)),
    "w": rs.standard_normal((*tokens, width)),
    "w_state": rs.standard_normal(memory),
  }
  return {name: x.astype(np.float32) for name, x in drawn.items()}


def evaluate(given, case: Case, *, normalize=False, gated=False):
  """Returns out, final state and the gradients of the loss by name."""
  x = {name: np.asarray(a, np.float64) for name, a in given.items()}
  rms = {}
  if normalize:
    for name in "qkv":
      rms[name] = np.sqrt((x[name] ** 2).mean(-1, keepdims=True) + 1e-6)
      x[name] = x[name] / rms[name]
  out, final = np.zeros_like(x["q"]), np.array(x["state"])
  grads = {name: np.zeros_like(x[name]) for name in NAMES}
  for b in range(case.batch):
    for h in range(case.heads):
      lanes = slice(h * case.head, (h + 1) * case.head)
      memory, tape = x["state"][b, h], []
      for s in range(case.images):
        rows = slice(s * case.tokens, (s + 1) * case.tokens)
        q, k, v, gate = (
          x[name][b, rows, lanes] for name in ("q", "k", "v", "output_gate")
        )
        k = k / np.sqrt(case.head)
        g = x["log_gate"][b, rows, h]
        scores = q @ k.T
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        read = np.exp(np.cumsum(g))[:, None]
        decay = np.exp(g.mean())
        o = weights @ v + read * (q @ memory)
        tape.append((rows, q, k, v, gate, weights, read, decay, memory, o))
        memory = decay * memory + k.T @ v
        factor = 1 / np.sqrt((o * o).mean(1, keepdims=True) + 1e-6)
        silu = gate / (1 + np.exp(-gate))
        out[b, rows, lanes] = o * factor * silu if gated else o
      final[b, h] = memory

      dm = x["w_state"][b, h]
      for rows, q, k, v, gate, weights, read, decay, memory, o in tape[::-1]:
        do = x["w"][b, rows, lanes]
        if gated:
          factor = 1 / np.sqrt((o * o).mean(1, keepdims=True) + 1e-6)
          unit, sigmoid = o * factor, 1 / (1 + np.exp(-gate))
          slope = sigmoid * (1 + gate * (1 - sigmoid))
          grads["output_gate"][b, rows, lanes] = do * unit * slope
          du = do * gate * sigmoid
          do = factor * (du - unit * (du * unit).mean(1, keepdims=True))
        dw = do @ v.T
        ds = weights * (dw - (weights * dw).sum(1, keepdims=True))
        dread = (do * (q @ memory)).sum(1)
        dq = ds @ k + read * (do @ memory.T)
        dk = ds.T @ q + v @ dm.T
        dv = weights.T @ do + k @ dm
        dcumulative = dread * read[:, 0]
        dg = np.cumsum(dcumulative[::-1])[::-1]
        dg = dg + (dm * memory).sum() * decay / case.tokens
        dm = decay * dm + (read * q).T @ do
        grads["q"][b, rows, lanes] = dq
        grads["k"][b, rows, lanes] = dk / np.sqrt(case.head)
        grads["v"][b, rows, lanes] = dv
        grads["log_gate"][b, rows, h] = dg
      grads["state"][b, h] = dm
  for name, root in rms.items():
    along = (grads[name] * x[name]).mean(-1, keepdims=True)
    grads[name] = (grads[name] - x[name] * along) / root
  return out, final, grads
