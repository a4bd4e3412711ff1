"""What the Hub takes as metadata of a card. It says no only when a card is committed: here it is said before anything
else is done."""

import re
from typing import Any

from .hub_ids import looks_like_hub_id

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib
    """.split()
)
# ISO 639-1; the codes of three letters, ISO 639-2 and 639-3, are nearly all combinations there are.
LANGUAGES = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss
    st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """.split()
)
OTHER_LANGUAGES = ("code", "multilingual")
DATA_FILE = re.compile(r".*\.(arrow|csv|gz|jsonl?|parquet|tsv|txt|zip)", re.IGNORECASE)


def check_card_metadata(
    *, license: str | None = None, language: str | list[str] | None = None, **ids: str | list[str] | None
) -> None:
    """Of a card: the identifier of a license, language codes (one, or a list), and by the names of their arguments Hub
    ids of models and datasets (one, or a list). None is always allowed.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"`license={license!r}` is not allowed: it must be an identifier of "
            f"https://huggingface.co/docs/hub/repositories-licenses, such as 'apache-2.0' or 'mit', and 'other' for a "
            f"license that is not there."
        )
    for code in as_list(language):
        is_known = code in (LANGUAGES, OTHER_LANGUAGES)[len(str(code)) > 2]
        if not is_known and not re.fullmatch("[a-z]{3}", str(code)):
            raise ValueError(
                f"`language={language!r}` is not allowed: {code!r} must be an ISO 639 code of two or three lower-case "
                f"letters, such as 'en' or 'deu', or one of {list(OTHER_LANGUAGES)}."
            )
    for name, given in ids.items():
        for value in as_list(given):
            if not looks_like_hub_id(value) or DATA_FILE.fullmatch(str(value)):
                raise ValueError(
                    f"`{name}={given!r}` is not allowed: {value!r} must be a Hub id, 'user/name', and no file or "
                    f"address."
                )


def as_list(value: Any) -> list:
    """One or several as several, and None as none."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)
