"""FlowAR's scale loop against golden and reference values, and its promises."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arflow_jax import branches
from arflow_jax.analysis import flops
from arflow_jax.errors import ConfigError
from arflow_jax.flow import solvers
from arflow_jax.flow.guidance import Guidance
from arflow_jax.flowar import sampler
from arflow_jax.flowar.network import FlowAR
from arflow_jax.flowar.objective import integer_levels
from configs.flowar import get_config
from tests.conftest import (
  channels_first,
  channels_last,
  parity_files,
  relative_error,
)
from tests.flowar.helpers import (
  SCALES,
  golden_network,
  head_of,
  published_network,
  random_params,
)

GOLDEN = {
  False: (
    [-0.77213, -1.68955, 1.43349, 3.06497, 3.55429, -1.24204],
    [1.33384, 0.27501, -3.52116, -2.68431, -1.90520, -0.99353],
    1.77159,
  ),
  True: (
    [-0.40199, 3.24713, 0.44592, 0.42655, 1.77471, -0.28167],
    [-0.48039, 2.59247, -2.11018, 1.35737, 0.62656, 1.59592],
    1.81860,
  ),
}


def _settings(**changes):
  """Those published for the L network, some of them changed."""
  sample = get_config("imagenet256-l").sample
  sample.update(changes)
  return sampler.Settings.from_config(sample)


CONDITIONS, DRAW_SCALE = FlowAR.conditions, sampler.draw_scale


@functools.cache
def _conditions(network, first):
  return jax.jit(functools.partial(CONDITIONS, network, first=first))


@functools.cache
def _scale(head, side, levels, guidance, integrator):
  def draw(z, noise):
    rest = (np.array(levels), guidance, integrator)
    return DRAW_SCALE(head, side, z, noise, lambda i: noise, *rest)

  return jax.jit(draw)


def _draw(network, labels, noise, settings):
  """The scale loop with given noise: each scale's image and condition.

  Its parts are compiled one by one, so that several runs share them.
  """
  batch, seen = len(labels), []

  def conditions(network, labels, inputs, cache, *, first):
    z, cache = _conditions(network, first)(labels, inputs, cache)
    seen.append(z)
    return z, cache

  def draw_scale(head, side, z, noise, kicks, levels, guidance, integrator):
    compiled = _scale(head, side, tuple(levels), guidance, integrator)
    return compiled(z, noise)

  with (
    mock.patch.object(FlowAR, "conditions", conditions),
    mock.patch.object(sampler, "draw_scale", draw_scale),
  ):
    given = lambda index, i: noise[index][:batch]
    return sampler.draw_scales(network, labels, settings, given), seen


@pytest.mark.parametrize(
  "cross", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_golden_sample(cross):
  rs = np.random.RandomState(1234)
  network = golden_network(rs, cross)
  rs.standard_normal((2, 16, 16, 16))
  rs.uniform(size=(5, 2))
  for s in SCALES:
    rs.standard_normal((2, s * s, 16))
  noise = [
    jnp.asarray(rs.standard_normal((4, s * s, 16)), jnp.float32) for s in SCALES
  ]
  settings = _settings(guidance=2.4, guidance_low=0.1)
  drawn, _ = _draw(network, jnp.array([3, 7]), noise, settings)
  first, last, std = GOLDEN[cross]
  final = channels_first(drawn[-1])
  np.testing.assert_allclose(final[0, 0, 0, :6], first, atol=1e-3)
  np.testing.assert_allclose(final[1, 15, 15, 10:], last, atol=1e-3)
  np.testing.assert_allclose(final.std(), std, atol=2e-4)


@pytest.mark.parametrize(
  "path",
  [
    # The short command has this form's golden values.
    *(
      pytest.param(*file.values, id=file.id, marks=pytest.mark.slow)
      for file in parity_files("flowar_sample")
    ),
    *parity_files("flowar_sample_*"),
  ],
)
def test_published_samples(path, load_parity):
  z = load_parity(path)
  network, config = published_network(
    z.params(), patch_size=z.meta["constructor"]["patch_size"]
  )
  for run in z.cases():
    name = run["name"]
    settings = _settings(
      num_steps=run["num_steps"],
      guidance=float(run["cfg"]),
      guidance_low=round(1 - run["guidance"], 6),
    )
    levels = settings.levels(run["num_steps"])
    integers = integer_levels(jnp.asarray(levels[:-1], jnp.float32))
    np.testing.assert_array_equal(integers, run["integer_times"])
    labels = jnp.asarray(z[f"in/{name}/labels"])
    batch = len(labels)
    rows = batch if run["cfg"] == 1 else 2 * batch
    noise = [z[f"in/{name}/noise/{s}"] for s in config.scales]
    drawn, conditions = _draw(network, labels, noise, settings)
    wanted = channels_last(z[f"out/{name}/latents"])
    assert relative_error(drawn[-1], wanted) < 5e-4
    for i, s in enumerate(config.scales):
      wanted_z = jnp.asarray(z[f"out/{name}/z/{s}"])[:rows]
      wanted = z[f"out/{name}/sample/{s}"][:batch]
      assert relative_error(conditions[i], wanted_z) < 5e-4, (name, s)
      tokens = config.pyramid.tokens(drawn[i])
      assert relative_error(tokens, wanted) < 5e-4, (name, s)
      share = i / max(len(config.scales) - 1, 1)
      guidance = settings.classifier_free(share)
      assert guidance.scale == pytest.approx(run["scaled_cfg"][i])
      compiled = _scale(
        network.head, s, tuple(levels), guidance, settings.integrator
      )
      alone = compiled(wanted_z, noise[i][:batch])
      assert relative_error(alone, wanted) < 5e-5, (name, s)


@pytest.mark.parametrize("path", parity_files("flowar_flow_network*"))
def test_published_head_samplers(path, load_parity):
  z = load_parity(path)
  for network in z.cases("networks"):
    head, name = head_of(z, network), f"n{network['index']}"
    x, condition = z[f"in/{name}/x"], z[f"in/{name}/z"]
    batch = len(x) // 2
    assert network["runs"]
    for run in network["runs"]:
      method = {"euler": "ode", "euler_maruyama": "sde"}[run["kind"]]
      kind = {"ode": "euler", "sde": "em"}[method] + f"_{run['index']}"
      settings = _settings(method=method)
      guided = run["cfg_scale"] > 1  # below, the published sampler does not
      draw = functools.partial(
        sampler.draw_scale,
        head,
        network["grid"],
        levels=settings.levels(run["num_steps"]),
        guidance=Guidance(
          float(run["cfg_scale"]) if guided else 1.0,
          (round(1 - run["guidance_high"], 6), 1.0),
          None,
        ),
        integrator=settings.integrator,
      )
      # Without guidance both halves are samples of their own.
      for half in range(1 if guided else 2):
        rows = slice(half * batch, (half + 1) * batch)
        kicks = None
        if method == "sde":
          kicks = z[f"in/{name}/{kind}_noise"][:, rows]
        out = jax.jit(
          lambda c, x, kicks, draw=draw: draw(
            z=c, noise=x, kicks=lambda i: kicks[i]
          )
        )(condition if guided else condition[rows], x[rows], kicks)
        wanted = z[f"out/{name}/{kind}"][rows]
        assert relative_error(out, wanted) < 5e-5, (name, kind)


def test_published_grids():
  """Steps of 25 make 24 with a jump from 0.3 to 0.25; 50 are even."""
  settings = _settings()
  grid = settings.levels(25)
  assert len(grid) == 25
  np.testing.assert_allclose(grid[[0, 11, 12, 24]], [1, 0.3, 0.25, 0])
  np.testing.assert_allclose(settings.levels(50), np.linspace(1, 0, 51))
  uniform = _settings(grid="uniform").levels(50)
  np.testing.assert_array_equal(uniform, settings.levels(50))
  own = _settings(grid="1,0.6,0.25,0")
  np.testing.assert_array_equal(own.levels(25), [1, 0.6, 0.25, 0])
  em = _settings(method="sde").levels(8)
  assert len(em) == 9
  np.testing.assert_allclose(em[-2:], [0.04, 0])


def _branch(scales, **model):
  config = get_config("digits").unlock()
  config.model.update({"image_size": scales[-1], "scales": scales} | model)
  config.model.update({"width": 16, "num_heads": 2, "head_depth": 1})
  return branches.build(config), config


def _tiny(**sample):
  branch, config = _branch((1, 2))
  config.sample.update({"num_steps": 4} | sample)
  return branch, branch.settings(config.sample)


KEYS = jax.vmap(jax.random.key)(jnp.arange(2))
LABELS = jnp.array([1, 4])


@functools.cache
def _program(**sample):
  branch, settings = _tiny(**sample)
  params = random_params(jax.eval_shape(branch.init, jax.random.key(0)))
  draw = jax.jit(lambda p, k, y: branch.sample(p, k, y, settings))
  return functools.partial(draw, params)


def _images(labels=LABELS, keys=KEYS, **sample):
  return _program(**sample)(keys, labels)


@pytest.mark.parametrize("method", sampler.METHODS)
def test_an_image_depends_on_its_key_and_label_only(method):
  settings = {"method": method, "guidance": 6.0}
  found = _images(**settings)
  others = jax.vmap(jax.random.key)(jnp.array([1, 7]))
  moved = _images(jnp.array([4, 9]), others, **settings)
  np.testing.assert_allclose(found[1], moved[0], atol=1e-4)
  assert not np.allclose(found[0], moved[1])
  assert not np.allclose(found, _images(keys=others, **settings))
  assert not np.allclose(found, _images(jnp.array([4, 1]), **settings))


@pytest.mark.slow
def test_guidance_one_and_no_label_work():
  plain = _images(guidance=1.0)
  almost = _images(guidance=1 + 1e-6)
  np.testing.assert_allclose(plain, almost, atol=1e-3)
  for scale in (0.0, 6.0):
    guided = _images(method="ode", guidance=scale)
    assert np.abs(plain - guided).max() > 1e-3
  null = jnp.full_like(LABELS, 10)
  free = _images(null, guidance=1.0)
  guided = _images(null, method="ode", guidance=6.0)
  np.testing.assert_allclose(free, guided, atol=1e-4)  # nothing to tell apart


def test_a_single_scale_is_the_last_one():
  branch, config = _branch((4,))
  params = random_params(jax.eval_shape(branch.init, jax.random.key(0)))
  config.sample.num_steps = 3

  def draw(scale):
    config.sample.guidance = scale
    settings = branch.settings(config.sample)
    run = jax.jit(lambda: branch.sample(params, KEYS, LABELS, settings))
    return run()

  assert np.abs(draw(1.0) - draw(6.0)).max() > 1e-3


def test_no_draw_of_noise_is_used_twice(monkeypatch):
  asked = []

  def draw(index, i):
    asked.append((index, i))
    return jnp.zeros((2, 4**index, 1))

  def sde(velocities, x, carry, grid, noise, **keywords):
    noise(0), noise(1)
    return x, carry

  monkeypatch.setattr(solvers, "sde", sde)
  branch, settings = _tiny(method="sde")
  scales = lambda p: sampler.draw_scales(
    branch.network(p), LABELS, settings, draw
  )
  jax.eval_shape(scales, jax.eval_shape(branch.init, jax.random.key(0)))
  assert asked == [(index, i) for index in range(2) for i in range(3)]


def test_guidance_rises_over_the_scales():
  settings = _settings(guidance=2.4)
  found = [settings.classifier_free(k / 4).scale for k in range(5)]
  np.testing.assert_allclose(found, [1, 1.35, 1.7, 2.05, 2.4])


@pytest.mark.parametrize("cross", [False, True])
def test_no_head_call_is_wasted(cross):
  """Calls of the head, one row each: 2 inside the interval, else 1."""
  branch, config = _branch((1, 2), cross_attention=cross)
  config.sample.update({"num_steps": 10, "grid": "uniform"})
  params = jax.eval_shape(branch.init, jax.random.key(0))

  def cost(**sample):
    config.sample.update({"guidance": 2.0} | sample)
    settings = branch.settings(config.sample)
    run = lambda p, k, y: branch.sample(p, k, y, settings)
    return flops.count(run, params, KEYS, LABELS)

  # Each step in which the scales are guided adds as much as the next one.
  none = cost(guidance_low=0.95, guidance_high=0.96)  # no step starts there
  one = cost(guidance_low=0.5, guidance_high=0.5)
  step = cost(guidance_low=0.5, guidance_high=0.6) - one
  assert 0 < step < one - none  # the first also needs the null conditions
  assert cost(guidance_low=0.1, guidance_high=1.0) == one + 8 * step
  # Steps of the first scale cost the same with guidance or without.
  with_first = cost(scale_steps=(20, 10))
  without = cost(scale_steps=(20, 10), guidance=1.0)
  assert with_first - cost() == without - cost(guidance=1.0)

  # Unguided, a scale costs the same whether there are null conditions or not.
  settings = branch.settings(config.sample)

  def first_scale(rows):
    z = jax.ShapeDtypeStruct((rows, 1, 16), jnp.float32)
    noise = jax.ShapeDtypeStruct((2, 1, 1), jnp.float32)
    draw = lambda params, z, noise: sampler.draw_scale(
      branch.network(params).head,
      1,
      z,
      noise,
      lambda i: noise,
      settings.levels(10),
      settings.classifier_free(0.0),
      settings.integrator,
    )
    return flops.count(draw, params, z, noise)

  assert first_scale(4) == first_scale(2)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"method": "heun"}, "sample.method='heun'"),
    ({"grid": "even"}, "sample.grid='even'"),
    ({"grid": "1,0.5"}, "must fall from 1 to 0"),
    ({"grid": "1,0.2,0.3,0"}, "must fall from 1 to 0"),
    ({"grid": "1,0"}, "in 2 steps or more"),
    ({"grid": "even", "method": "sde"}, "sample.grid='even'"),
    ({"grid": "1,0.5,0", "method": "sde"}, "leaves no room"),
    ({"grid": "1,0.5,0", "scale_steps": (4, 4)}, "leaves no room"),
    ({"num_steps": 1}, "sample.num_steps=1"),
    ({"guidance": float("inf")}, "sample.guidance=inf"),
    ({"scale_steps": (4, 1)}, "sample.scale_steps=1"),
    ({"scale_steps": (4,)}, r"sample.scale_steps=\(4,\) must name 2"),
    ({"guidance": -1.0}, "sample.guidance=-1.0"),
    ({"guidance_low": -0.1}, "sample.guidance_low=-0.1"),
    ({"guidance_high": 1.5}, "sample.guidance_high=1.5"),
    ({"guidance_low": 0.9, "guidance_high": 0.1}, "sample.guidance_low=0.9"),
  ],
)
def test_bad_settings_are_refused_by_name(change, named):
  with pytest.raises(ConfigError, match=named):
    _tiny(**change)
