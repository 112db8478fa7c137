"""Denoisers: guesses of the clean sample from a noisy one, and what wraps around them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .cond import Cond, join, part_of
from .path import Coefs, Path, Time, column, rows_of

Features = list[Tensor]
Clock = Literal["t", "999t", "1000t", "index", "log_sigma/4", "250 log_sigma"]
CLOCKS: tuple[str, ...] = get_args(Clock)
PRECONDITIONED = ("edm", "edm_v", "cm")
"""Predictions ``x0 = c_skip x + c_out F`` of ``Wrapped``."""


class Denoiser(nn.Module, ABC):
    """``E[x0 | x_t, cond]`` on a path.

    ``forward(x, t, cond, want)``: x is [batch, ...], t a float or [batch]; ``want`` is a prediction's name
    (x0, eps, v, velocity, flow, score), ``features`` (a list of intermediate tensors) or ``both``
    (x0 and features). ``s``, a later time, is read by flow maps alone.
    """

    path: Path

    @abstractmethod
    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any: ...

    def velocity(self, x: Tensor, t: Time, cond: Cond = None) -> Tensor:
        """``dx_t / dt`` of the deterministic flow."""
        return self(x, t, cond, "velocity")

    def null(self, cond: Cond) -> Cond:
        """The "no condition" that stands against a condition in guidance; ValueError where there is none."""
        raise ValueError(f"{type(self).__name__} knows no negative condition: guidance needs one")


def clock_of(name: str, path: Path, t: Tensor) -> Tensor:
    """What a network reads in place of t: ``index`` counts a thousand-step table from 0."""
    match name:
        case "t":
            return t
        case "999t":
            return 999 * t
        case "1000t":
            return 1000 * t
        case "index":
            table = getattr(path, "alphas_cumprod", None)
            return t * (len(table) if table is not None else 1000) - 1
        case "log_sigma/4":
            return -path.lam(t).to(t) / 4
        case "250 log_sigma":
            return -250 * path.lam(t).to(t)
    raise ValueError(f"unknown clock {name!r}: one of {', '.join(CLOCKS)}")


class Wrapped(Denoiser):
    """A network made a denoiser.

    ``net(c_in x, clock(t), cond)`` is read as ``prediction``. Besides the path's predictions there are three
    preconditioned ones for variance-exploding paths, ``x0 = c_skip x + c_out F``:

    - ``edm``: c_skip = sd^2 / (s^2 + sd^2), c_out = s sd / sqrt(s^2 + sd^2)  (Karras et al. 2022, Table 1);
    - ``edm_v``: the same with the opposite c_out: v of the scaled sample (Stable Video Diffusion, diffusers' EDM);
    - ``cm``: ``edm`` with s - ``boundary`` in c_skip and in c_out's numerator, so that the guess at the
      boundary is x itself (Song et al. 2023, Appendix C; diffusers' CMStochasticIterativeScheduler).

    ``data_std`` sets both of them and, where ``scale_input`` is on, ``c_in = 1 / sqrt(alpha^2 sd^2 + sigma^2)``.
    ``taps`` are names of submodules of ``net`` whose outputs are the features; see ``choose_taps``.
    """

    def __init__(
        self,
        net: nn.Module,
        path: Path,
        prediction: str = "x0",
        clock: str = "t",
        *,
        scale_input: bool = False,
        data_std: float = 1.0,
        boundary: float = 0.002,
        taps: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if prediction in PRECONDITIONED and path.coefs(path.t_max).d_alpha != 0:
            raise ValueError(f"prediction {prediction!r} needs the exploding path, got {type(path).__name__}")
        self.net, self.path, self.prediction, self.clock = net, path, prediction, clock
        self.scale_input, self.data_std, self.boundary = scale_input, data_std, boundary
        self.taps: tuple[str, ...] = tuple(taps)

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        if want == "features":
            coefs = self.path.at(t, x) if self.scale_input else None
            with tapped(self.net, self.taps, stop=True) as features:
                try:
                    self._call(x, t, cond, s, coefs)
                except _Enough:
                    pass
            return features
        guess = "x0" if want == "both" else want
        plain = self.prediction == guess and not self.scale_input
        coefs = None if plain else self.path.at(t, x)  # once for the way in and the way out
        if want == "both":
            with tapped(self.net, self.taps) as features:
                value = self._call(x, t, cond, s, coefs)
            return self._read(value, x, t, guess, coefs), features
        return self._read(self._call(x, t, cond, s, coefs), x, t, guess, coefs)

    def null(self, cond: Cond) -> Cond:
        give = getattr(self.net, "null", None)
        if give is None:
            return super().null(cond)
        negative: Cond = give(cond)
        return negative

    def _call(self, x: Tensor, t: Time, cond: Cond, s: Time | None, coefs: Coefs | None) -> Tensor:
        times = rows_of(t, x)
        entry = x
        if self.scale_input and coefs is not None:
            entry = (x / torch.sqrt(coefs.alpha**2 * self.data_std**2 + coefs.sigma**2)).to(x.dtype)
        clock = clock_of(self.clock, self.path, times)
        if not getattr(self.net, "reads_s", False):
            return self.net(entry, clock, cond)
        if s is None:  # a plain guess is that of no jump
            return self.net(entry, clock, cond, torch.zeros_like(times))
        span = self.path.straight(times) - self.path.straight(rows_of(s, x))
        return self.net(entry, clock, cond, span.to(times))

    def _read(self, value: Tensor, x: Tensor, t: Time, want: str, coefs: Coefs | None) -> Tensor:
        if self.prediction not in PRECONDITIONED or coefs is None:
            return self.path.convert(value, x, t, self.prediction, want, coefs)
        sigma, sd = coefs.sigma, self.data_std
        low = self.boundary if self.prediction == "cm" else 0.0
        away = sigma - low
        skip = sd**2 / (away**2 + sd**2)
        out = away * sd / torch.sqrt(sigma**2 + sd**2)
        if self.prediction == "edm_v":
            out = -out
        return self.path.convert((skip * x + out * value).to(x.dtype), x, t, "x0", want, coefs)


class _Around(Denoiser):
    """What changes a denoiser's guess and leaves the rest alone."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner, self.path = inner, inner.path

    def null(self, cond: Cond) -> Cond:
        return self.inner.null(cond)


class Guided(_Around):
    """Classifier-free guidance, ``D(negative) + scale (D(cond) - D(negative))``, in one batched call.

    ``scale`` is a number, or one for each row [batch]. ``negative`` gives the negative condition for a condition (a
    negative prompt, say); None asks ``inner.null``.
    ``interval`` are the times (low, high] in which guidance is on; outside it costs nothing and does nothing.
    scale = 1 is no guidance (Ho & Salimans 2022, in the convention of most code). ``rescale`` in [0, 1] is the share
    in which the guided guess of x0 gets back the standard deviation, row by row, of the guess for the condition
    (Lin et al. 2023, eq. 15-16): against the burnt look of strong guidance. It acts on x0 whatever is wanted, so that
    every solver sees the same denoiser.
    """

    def __init__(
        self,
        inner: Any,
        scale: float | Tensor,
        negative: Callable[[Cond], Cond] | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(inner)
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale is a share in [0, 1], got {rescale}")
        self.scale, self.interval, self.rescale = scale, interval, rescale
        self.negative = inner.null if negative is None else negative

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        each = isinstance(self.scale, Tensor)
        if want == "features" or not each and self.scale == 1:
            return self.inner(x, t, cond, want, s)
        strength: float | Tensor = self.scale - 1
        if self.interval is not None:
            low, high = self.interval
            if not isinstance(t, Tensor):
                if not low < t <= high:
                    return self.inner(x, t, cond, want, s)
            else:
                strength, each = ((t > low) & (t <= high)).to(x.dtype) * strength, True
        if each:
            strength = column(torch.as_tensor(strength), x)
        twice = torch.cat([x, x])
        times = torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t
        later = torch.cat([s, s]) if isinstance(s, Tensor) and s.ndim else s
        asked = "x0" if self.rescale and want != "both" else want
        answer = self.inner(twice, times, join(cond, self.negative(cond)), asked, later)
        if want == "both":
            guess, features = answer
            return self._mixed(guess, strength), [f.chunk(2)[0] for f in features]
        mixed = self._mixed(answer, strength)
        return mixed if asked == want else self.path.convert(mixed, x, t, asked, want)

    def _mixed(self, answer: Tensor, strength: float | Tensor) -> Tensor:
        plain, other = answer.chunk(2)
        mixed = plain + strength * (plain - other)
        if not self.rescale:
            return mixed
        own, now = (v.flatten(1).float().std(1, correction=0) for v in (plain, mixed))
        factor = 1 + self.rescale * (own / now.clamp(min=1e-12) - 1)
        return mixed * column(factor, mixed).to(mixed.dtype)


class Counted(_Around):
    """Counts network calls: ``calls`` (entries) and ``images`` (rows, guidance counted twice)."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner)
        self.calls = self.images = 0

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        self.calls += 1
        self.images += x.shape[0]
        return self.inner(x, t, cond, want, s)


class Clipped(_Around):
    """Holds the guess of x0 inside [low, high], and every other prediction with it."""

    def __init__(self, inner: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(inner)
        if not low < high:
            raise ValueError(f"a clipping range needs low < high, got {low} and {high}")
        self.low, self.high = low, high

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        if want == "features":
            return self.inner(x, t, cond, want, s)
        if want == "both":
            guess, features = self.inner(x, t, cond, want, s)
            return guess.clamp(self.low, self.high), features
        guess = self.inner(x, t, cond, "x0", s).clamp(self.low, self.high)
        return self.path.convert(guess, x, t, "x0", want)


class Thresholded(_Around):
    """Dynamic thresholding: each row's guess of x0 is held to its own quantile, then scaled back to ``bound``.

    ``q = max(bound, quantile(|x0|))``, ``x0 = clip(x0, -q, q) bound / q`` (Saharia et al. 2022, Section 2.3). ``most``
    caps q, as diffusers' ``sample_max_value`` does. For pixels alone: it destroys latents. Every other prediction
    follows the guess.
    """

    def __init__(self, inner: Denoiser, quantile: float = 0.995, bound: float = 1.0, most: float = math.inf) -> None:
        super().__init__(inner)
        if not 0 < quantile <= 1 or not bound > 0:
            raise ValueError(f"thresholding needs a quantile in (0, 1] and bound > 0, got {quantile} and {bound}")
        if not most >= bound:
            raise ValueError(f"thresholding needs most >= bound, got {most} and {bound}")
        self.quantile, self.bound, self.most = quantile, bound, most

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        if want == "features":
            return self.inner(x, t, cond, want, s)
        if want == "both":
            guess, features = self.inner(x, t, cond, want, s)
            return self._held(guess), features
        return self.path.convert(self._held(self.inner(x, t, cond, "x0", s)), x, t, "x0", want)

    def _held(self, guess: Tensor) -> Tensor:
        size = guess.abs().flatten(1)
        rank = max(1, math.ceil(self.quantile * size.shape[1]))  # an order statistic: torch.quantile has a size limit
        limit = column(size.kthvalue(rank, dim=1).values.clamp(self.bound, self.most), guess)
        return torch.clamp(guess, -limit, limit) * (self.bound / limit)


class Reframed(_Around):
    """A denoiser of one path seen on another: equal signal-to-noise ratios are the same question.

    ``x_b / (alpha_b + sigma_b) = x_a / (alpha_a + sigma_a)`` where ``sigma / alpha`` agree. Levels beyond
    the inner path's noisiest are asked at its noisiest.
    """

    def __init__(self, inner: Denoiser, path: Path) -> None:
        super().__init__(inner)
        self.path = path

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        there = self.match(t, x)
        here, far = self.path.at(t, x), self.inner.path.at(there, x)
        moved = (x * (far.alpha + far.sigma) / (here.alpha + here.sigma)).to(x.dtype)
        later = None if s is None else self.match(s, x)
        answer = self.inner(moved, there, cond, want if want in ("features", "both") else "x0", later)
        if want in ("features", "both", "x0"):
            return answer
        return self.path.convert(answer, x, t, "x0", want, here)

    def match(self, t: Time, like: Tensor) -> Time:
        """The inner path's time with the same ratio of noise to signal."""
        time = self.inner.path.time(self.path.lam(t))
        return (
            time.to(like.device, torch.promote_types(like.dtype, torch.float32))
            if isinstance(t, Tensor)
            else float(time)
        )


def guided(denoiser: Any, scale: float | Tensor) -> Any:
    """A denoiser, or a player that is called like one, under guidance; itself where there is none."""
    return denoiser if not isinstance(scale, Tensor) and scale == 1 else Guided(denoiser, scale)


def inner_of(denoiser: Any) -> Any:
    """What is inside all wrappers."""
    while hasattr(denoiser, "inner"):
        denoiser = denoiser.inner
    return denoiser


def seen_on(denoiser: Any, path: Path) -> Any:
    """A denoiser on a path: itself where it is its own, ``Reframed`` elsewhere; None stays None."""
    return denoiser if denoiser is None or denoiser.path == path else Reframed(denoiser, path)


class Centred(_Around):
    """Noise around a part of the condition: the network sees ``x0 + sigma (eps + mu)``, mu = cond[key].

    CoMoSpeech's noise (Ye et al. 2023, eq. 4), as a change of variable: seen from here the noise is N(0, I) and the
    flow is the law's own, so that solvers, losses and students need not know. mu is shaped like x.
    """

    def __init__(self, inner: Denoiser, key: str) -> None:
        super().__init__(inner)
        self.key = key

    def forward(self, x: Tensor, t: Time, cond: Cond = None, want: str = "x0", s: Time | None = None) -> Any:
        coefs = self.path.at(t, x)
        moved = (x + coefs.sigma * part_of(cond, self.key)).to(x.dtype)
        answer = self.inner(moved, t, cond, want if want in ("features", "both") else "x0", s)
        return answer if want in ("features", "both", "x0") else self.path.convert(answer, x, t, "x0", want, coefs)


class _Enough(Exception):
    """Raised inside a network once every wanted feature was seen."""


@contextmanager
def tapped(net: nn.Module, names: Sequence[str], stop: bool = False) -> Iterator[Features]:
    """Collect the outputs of named submodules while the network runs; ``stop`` ends the run at the last.

    A sharded network (one that can ``reshard``) runs to its end and gives the features out with its own answer, as
    far as its hooks can see: they gather the weights for the backward pass of what comes out, and of nothing else.

    Raises ValueError where no name is given, or one is not a submodule.
    """
    if not names:
        raise ValueError("no taps: name the submodules whose outputs are the features (see choose_taps)")
    modules = dict(net.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(f"the network has no submodule {name!r}")
    seen: dict[str, Tensor] = {}
    features: Features = []
    sharded = hasattr(net, "reshard")

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = _tensor(output)
            if len(seen) == len(names):
                features[:] = [seen[n] for n in names]
                if stop and not sharded:
                    raise _Enough

        return keep

    handles = [modules[name].register_forward_hook(hook(name)) for name in names]
    if sharded:
        handles.append(net.register_forward_hook(lambda module, args, output: (output, features), prepend=True))
        handles.append(net.register_forward_hook(lambda module, args, output: output[0]))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _tensor(output: Any) -> Tensor:
    """The first tensor of a module's output, whatever holds it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            found = _tensor(item) if isinstance(item, (Tensor, tuple, list, dict)) else None
            if found is not None:
                return found
    raise ValueError(f"a tapped module returned {type(output).__name__}, which holds no tensor")


def choose_taps(net: nn.Module, run: Callable[[], Any], count: int = 1) -> tuple[str, ...]:
    """Pick ``count`` submodules to read features from, by running the network once.

    Works on any network: candidates are blocks (submodules of several parts) called exactly once, with a float
    input and a float output of at least two dimensions, batch included; in a flat network without blocks, any
    part but the last. The deepest (most channels over least positions) in the middle of the call order wins;
    more taps are spread before it.
    """
    order: list[tuple[str, int, int]] = []
    blocks: set[str] = set()
    handles = []
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            try:
                value = _tensor(output)
            except ValueError:
                return
            entry = next((a for a in args if isinstance(a, Tensor)), None)
            if entry is not None and entry.is_floating_point() and value.is_floating_point() and value.ndim >= 2:
                tokens = value.ndim == 3
                positions = (
                    value.shape[1] if tokens else int(torch.tensor(value.shape[2:]).prod()) if value.ndim > 2 else 1
                )
                channels = value.shape[2] if tokens else value.shape[1]
                order.append((name, channels, positions))

        return see

    for name, module in net.named_modules():
        if name and list(module.children()) or isinstance(module, nn.SiLU):
            blocks.add(name)
        if name:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    once = [o for o in order if calls[o[0]] == 1]
    spatial = [o for o in once if o[0] in blocks] or once[:-1]
    many = [o for o in spatial if o[2] > 1]
    candidates = many or spatial
    if not candidates:
        raise ValueError(f"found no module to read features from in {type(net).__name__}; name them in taps")
    least = min(o[2] for o in candidates)
    most = max(o[1] for o in candidates if o[2] == least)
    deepest = [i for i, o in enumerate(candidates) if o[2] == least and o[1] == most]
    last = deepest[(len(deepest) - 1) // 2] if many else deepest[len(deepest) // 2]
    if count > last + 1:
        count = last + 1
    picks = sorted({last - (last * i) // count for i in range(count)})
    return tuple(candidates[i][0] for i in picks)
