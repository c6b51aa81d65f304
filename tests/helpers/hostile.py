"""Names that mean something to a program behind ours, and what must hold wherever they are shown."""

from __future__ import annotations

import re

ACTIVE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
NAMES = (
    *("price_$10_$20", "$x^$", r"$\frac{1}{", r"\input{/etc/passwd}", "$$", "_", "_hidden", "a_b_c", "__x__"),
    *("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b[2J", "a\nb", "a\r\nb", "a\tb", "\x00", "\x9b1m", "\u202etxt.exe"),
    *("a\u2028b", "\ufeffbom", "\u2066x", "fresh\ngrappa: all is fresh"),
    *("=1+1", "+1+1", "-1+1", "@SUM(A1)", "=cmd|' /C calc'!A0", "'=1", "''@x", "\t=1", "-5", "+", "\uff1d1", "'", "-"),
    *("a|b", "a\\|b", "\\", "\\\\|", "*a*", "**b**", "`c`", "``", "[x](http://a.b)", "![x](y)", "[x]: y", "[x][y]"),
    *(
        "<b>x</b>",
        "<script>alert(1)</script>",
        "<!-- x",
        "-->",
        "]]>",
        "&amp;",
        "&#x3c;b&#x3e;",
        "~~x~~",
        "a<b>&\"c\"'d'",
    ),
    *("http://a.b/c", "www.a.b", "x@y.z", "# h", "- item", "1. one", "> q", "---", "| --- |", "    code"),
    *(
        "[bold]x[/bold]",
        "[/]",
        "%s %d %(x)s",
        "{0} {x}",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "$(touch x)",
        "`touch x`",
        "; rm x",
    ),
    *("#SBATCH --x", "a\n#SBATCH --wrap=x", "x --uid=0", "鳥 ∑ é", "👩‍👩‍👧", "x" * 300, "..", "~", " lead and trail "),
    *("NA", "nan", "null", "true", "1e5", "inf", "_mean_", "None"),
)
