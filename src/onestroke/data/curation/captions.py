"""Captions made fit to train on: markup and boilerplate out, booru tags into a sentence, one script, some length."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from onestroke.data.curation.recipe import CaptionStage

_BOILERPLATE = (
    r"https?://\S+|www\.\S+",
    r"\S+@\S+\.\w+",
    r"\b(?:image|photo|picture) (?:may contain|by @\w+|credit)\s*:?[^.,;]*",
    r"(?:stock|royalty[- ]free)[ -](?:photo(?:graph)?s?|images?|illustrations?|vectors?|pictures?)",
    r"(?:©|\(c\)|copyright)[^.;]*",
    r"all rights reserved",
    r"(?:click|tap) (?:here )?to (?:enlarge|zoom|view|download)[^.;]*",
    r"(?:free|hd|4k|high[- ]res(?:olution)?) (?:download|wallpapers?)",
    r"(?:buy|shop|order|download|subscribe|sign up)(?: it)? (?:now|today|here|free)[^.;]*",
    r"\b(?:img|dsc[nf]?|pict|screenshot|untitled|scan)[_ -]?\d[\w-]*(?:\.\w{3,4})?",
    r"\b[\w-]+\.(?:jpe?g|png|gif|webp|bmp|tiff?|psd)\b",
    r"(?<!\w)#\w+(?: #\w+)*",
    r"\b(?:score|rating|source|quality)[_:]\s*\S+",
)
_META_TAGS = """
    absurdres highres lowres incredibly_absurdres commentary commentary_request english_commentary translated
    translation_request check_translation partially_translated md5_mismatch bad_id bad_pixiv_id bad_twitter_id
    tagme duplicate jpeg_artifacts scan_artifacts photoshop_(medium) commission revision artist_request
    character_request copyright_request source_request masterpiece best_quality high_quality normal_quality
    low_quality worst_quality official_art signature watermark artist_name dated web_address twitter_username
    safe sensitive questionable explicit general newest recent mid early oldest"""
_META = frozenset(_META_TAGS.split())
_NUMBERS = {"1": "a", "2": "two", "3": "three", "4": "four", "5": "five", "6+": "many", "multiple": "several"}
_PEOPLE = {"girl": "girls", "boy": "boys", "other": "others", "koma": "koma"}
_WEARING = re.compile(
    r"\b(?:dress|skirt|shirt|blouse|jacket|coat|hat|cap|glasses|eyewear|goggles|gloves|boots|shoes|sandals|sneakers|"
    r"socks|thighhighs|pantyhose|kimono|uniform|sweater|hoodie|vest|scarf|ribbon|bow|bowtie|necktie|tie|shorts|pants|"
    r"jeans|swimsuit|bikini|armor|cape|cloak|apron|helmet|headphones|earrings|necklace|bracelet|jewelry|choker|mask|"
    r"hairband|hairclip|hair_ornament|hair ornament|hair flower|hijab|crown|serafuku|t-shirt)s?$"
)
_HAVING = re.compile(
    r"\b(?:hair|eyes?|bangs|ponytail|twintails|braids?|ahoge|ears|tail|horns?|wings?|halo|fangs?|freckles|beard|"
    r"mustache|skin|sidelocks|eyelashes|eyebrows|bun|buns|bob|curls|scar|tattoo|nails)$"
)
_DOING = re.compile(r"^[a-z]+ing\b|^looking |^holding |^v$|^smile$|^blush$|^open mouth$|^closed eyes$")
_AS_DOING = {"smile": "smiling", "blush": "blushing", "v": "making a peace sign", "open mouth": "with an open mouth"}


@dataclass(frozen=True)
class Cleaned:
    """A caption after cleaning, and what was done; where `dropped` says why, it is of no use."""

    text: str
    repairs: tuple[str, ...] = ()
    dropped: str = ""


def clean_caption(caption: str | None, stage: CaptionStage) -> Cleaned:
    """Markup, boilerplate and tags made into plain words; dropped where too little, or another script, is left."""
    if caption is None:
        return Cleaned("", dropped="no caption")
    repairs = []
    text = _plain(caption)
    stripped = _without_boilerplate(text, stage.boilerplate)
    if stripped != text:
        repairs.append("boilerplate")
    text = stripped
    if stage.tags and is_tags(text):
        text = tags_to_sentence(text)
        repairs.append("tags")
    if not any(letter.isalpha() for letter in text):
        return Cleaned("", tuple(repairs), "empty" if not caption.strip() else "nothing but boilerplate")
    if stage.scripts and script_share(text, stage.scripts) < stage.min_script_share:
        return Cleaned(text, tuple(repairs), f"not in {' or '.join(stage.scripts)} script")
    if stage.languages:
        found, confidence = language(text)
        if found not in stage.languages and confidence >= stage.min_confidence:
            return Cleaned(text, tuple(repairs), f"in {found}, not {' or '.join(stage.languages)}")
    if len(text) > stage.max_chars:
        text = shortened(text, stage.max_chars)
        repairs.append("shortened")
    if len(text) < stage.min_chars:
        return Cleaned(text, tuple(repairs), f"shorter than {stage.min_chars} characters")
    return Cleaned(text, tuple(repairs))


def _plain(caption: str) -> str:
    """Without markup, entities, control characters and runs of spaces; compatibility forms as their plain ones."""
    text = re.sub(r"<[/!]?[A-Za-z][^<>]{0,300}>", " ", html.unescape(caption))
    text = unicodedata.normalize("NFKC", text.replace("\N{REPLACEMENT CHARACTER}", ""))
    text = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return " ".join(text.split())


def _without_boilerplate(text: str, more: Sequence[str]) -> str:
    before = text
    for pattern in (*_BOILERPLATE, *more):
        text = _compiled(pattern).sub(" ", text)
    if text == before:
        return text
    text = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))
    text = re.sub(r"(?:[,;:|–—-]\s*)+(?=[,.;]|$)", "", text)  # separators that have lost what they separated
    return re.sub(r"([,.;])[,.;\s]*(?=[,.;])", "", text).lstrip(".").strip(" ,;:|–—-")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(pattern, re.IGNORECASE)


# Tags


def is_tags(text: str) -> bool:
    """Whether this is a list of booru tags: three or more short items, or words joined by underscores."""
    if re.search(r"[.!?]\s", text):
        return False
    items = _items(text)
    if len(items) < 3:
        return False
    short = sum(len(re.split(r"[ _]", item)) <= 4 for item in items) / len(items)
    has_mark = any("_" in item or re.fullmatch(r"\d\+?(?:girl|boy|other)s?|solo", item) for item in items)
    has_article = any(re.match(r"(?:a|an|the|and|with|in|on|his|her)[ _]", item) for item in items)
    return short >= 0.9 and (has_mark or (not has_article and len(items) >= 4 and "," in text))


def _items(text: str) -> list[str]:
    """Tags between commas; between spaces where there are none and underscores join words."""
    parts = text.split(",") if "," in text else text.split() if "_" in text else [text]
    return [item for part in parts if (item := part.strip(" .\\").replace("\\", "").lower())]


def tags_to_sentence(text: str) -> str:
    """`1girl, solo, long_hair, red_dress, smile, outdoors` as "a girl with long hair, wearing red dress, ..."."""
    tags = list(dict.fromkeys(item for item in _items(text) if item.replace(" ", "_") not in _META))
    who, having, wearing, doing, rest = [], [], [], [], []
    for tag in tags:
        words = tag if re.fullmatch(r"[^\w\s]*_[^\w\s]*", tag) else tag.replace("_", " ")
        person = re.fullmatch(r"(\d\+?|multiple) ?(girl|boy|other)s?", words)
        if person:
            number, noun = person.groups()
            who.append(f"{_NUMBERS.get(number, 'many')} {noun if number == '1' else _PEOPLE[noun]}")
        elif words in ("solo", "solo focus"):
            continue
        elif _DOING.search(words):
            doing.append(_AS_DOING.get(words, words))
        elif _HAVING.search(words):
            having.append(words)
        elif _WEARING.search(words):
            wearing.append(words)
        else:
            rest.append(words)
    parts = [" and ".join(who)] if who else []
    if having:
        parts[-1:] = [f"{parts[-1]} with {_listed(having)}"] if parts else [_listed(having)]
    parts += [f"wearing {_listed(wearing)}"] if wearing else []
    return ", ".join([*parts, *doing, *rest])


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# Script, language and length


def language(text: str) -> tuple[str, float]:
    """ISO 639 code of the likeliest language, and how sure that is, in [0, 1]: low for names and single words."""
    return _identifier().classify(text)


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def script_share(text: str, scripts: Sequence[str]) -> float:
    """The share of letters whose Unicode names begin with one of `scripts`; 1 where there are no letters."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(_script(letter) in scripts for letter in letters) / len(letters) if letters else 1.0


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0].lower()


def shortened(text: str, most: int) -> str:
    """At most `most` characters, cut after a sentence, else before a comma, else between words."""
    head = text[: most + 1]
    for pattern in (r"[.!?](?=\s)", r"(?=[,;])", r"(?=\s)"):
        ends = [match.end() for match in re.finditer(pattern, head) if match.end() <= most]
        if ends and ends[-1] > most // 3:
            return head[: ends[-1]]
    return text[:most]
