"""Licences of models: what a student inherits from its teacher. A table of facts, no legal advice."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["permissive", "use-restricted", "non-commercial", "unknown"]


@dataclass(frozen=True)
class Licence:
    """What is known of a licence.

    ``permissive``: keep the notice. ``use-restricted``: commercial use is allowed, under conditions that pass on
    to the student. ``non-commercial``: neither the teacher nor what is made from it may be sold, or nothing may
    be made from it. ``unknown``: not in the table; read it.
    """

    name: str
    kind: Kind
    about: str

    @property
    def asks(self) -> bool:
        """Whether somebody must accept it before a student is made."""
        return self.kind == "non-commercial"


_KEEP = "keep the copyright notice and the licence text with the student"
_COPYLEFT = "the student must be shared under the same licence"
_RAIL = "the list of forbidden uses passes on to the student and to everybody who gets it"
_NC = "no commercial use of the teacher, nor of a student made from it"
_ND = "nothing that is made from it may be shared, and a student is made from it"

# by the identifier that model cards carry (SPDX where there is one), in lower case
KNOWN: dict[str, tuple[Kind, str]] = {
    **dict.fromkeys(
        ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "bsl-1.0", "ms-pl", "cc-by-4.0",
         "cc-by-3.0", "cc-by-2.0", "cdla-permissive-2.0", "cdla-permissive-1.0", "ecl-2.0", "ofl-1.1", "postgresql",
         "artistic-2.0", "afl-3.0"),
        ("permissive", _KEEP),
    ),
    **dict.fromkeys(("cc0-1.0", "unlicense", "wtfpl", "pddl", "0bsd"), ("permissive", "no conditions")),
    **dict.fromkeys(
        ("gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "cc-by-sa-4.0", "cc-by-sa-3.0",
         "epl-2.0", "eupl-1.1", "eupl-1.2", "osl-3.0", "odbl"),
        ("use-restricted", _COPYLEFT),
    ),
    **dict.fromkeys(
        ("openrail", "openrail++", "bigscience-openrail-m", "bigscience-bloom-rail-1.0", "bigcode-openrail-m",
         "creativeml-openrail-m", "creativeml-openrail-m-addendum", "bigscience-bloom-rail-1.0"),
        ("use-restricted", _RAIL),
    ),
    **dict.fromkeys(
        ("stabilityai-community", "stabilityai-ai-community", "stability-ai-community"),
        ("use-restricted", "commercial use needs registration, and above a yearly revenue a paid licence"),
    ),
    **dict.fromkeys(
        ("tencent-hunyuan-community", "tencent-hunyuan", "hunyuan-community"),
        ("use-restricted", "not licensed in some regions nor above a number of users; its outputs may train no other "
         "model"),
    ),
    **dict.fromkeys(
        ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
        ("use-restricted", "conditions of use pass on to the student; some ask for a name or a notice"),
    ),
    "nvidia-open-model-license": ("use-restricted", "commercial use is allowed; guardrails must not be removed"),
    **dict.fromkeys(
        ("flux-1-dev-non-commercial-license", "flux-1-dev-non-commercial", "flux-dev-non-commercial-license",
         "flux-non-commercial-license", "stabilityai-nc-research-community", "stabilityai-non-commercial-research",
         "sai-nc-community", "sdxl-turbo-non-commercial", "playground-v2-5-non-commercial",
         "nvidia-source-code-license-nc", "nscl-v1", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0",
         "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "fair-noncommercial-research-license", "apple-amlr", "intel-research",
         "deepfloyd-if-license", "research-only"),
        ("non-commercial", _NC),
    ),
    **dict.fromkeys(
        ("cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0"),
        ("non-commercial", _ND),
    ),
}  # fmt: skip

# words that give a licence away whose name is in no table
_HINTS = re.compile(r"(?<![a-z])(nc|non-?commercial|research(-?only)?|academic|personal|evaluation)(?![a-z])")
_NO_WORKS = re.compile(r"(?<![a-z])(nd|no-?deriv\w*)(?![a-z])")


def licence_facts(name: str) -> Licence:
    """What is known of a licence by the name that a model card gives it.

    A name that is in no table but says "nc", "research only" or "no derivatives" counts as what it says.

    >>> licence_facts("Apache-2.0").kind, licence_facts("openrail++").kind, licence_facts("my-own").kind
    ('permissive', 'use-restricted', 'unknown')
    >>> licence_facts("acme-research-only-1.0").asks
    True
    """
    plain = re.sub(r"[\s_]+", "-", name.strip().lower())
    found = KNOWN.get(plain) or KNOWN.get(plain.removesuffix("-license").removesuffix("-licence"))
    if found is None and plain not in ("", "unknown", "other"):
        if _NO_WORKS.search(plain):
            found = ("non-commercial", f"its name says that nothing may be made from it: read it; {_ND}")
        elif _HINTS.search(plain):
            found = ("non-commercial", f"its name restricts it: read it; likely {_NC}")
    if found is None:
        why = "the teacher's folder names none" if plain in ("", "unknown", "other") else "it is in no table"
        return Licence(name or "unknown", "unknown", f"{why}: ask the author before the student is used or shared")
    return Licence(name, *found)
