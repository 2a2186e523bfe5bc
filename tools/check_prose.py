"""Report phrases that a reader has to decode: ``make lint`` runs it over all text of the repository, after codespell.

Each rule is a pattern and what to write instead. A line that must keep a phrase ends in ``prose: ok``.
"""

import re
import subprocess
import sys
from pathlib import Path

# Generated files, licenses, and logs that quote what was printed.
SKIPPED = {"LICENSE", "tools/check_prose.py", "docs/kill_test.md"}
SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".yaml", ".toml", ""}

RULES = {
    r"(?<!there )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b)\w+": "is not a ..., has no ..., there is no ...",
    r"\bbeside\b": "next to, besides, compared with",
    r"\bbut for\b": "except",
    r"\bat hand\b": "available",
    r"\bits kin\b|\band kin\b": "and similar ...",
    r"\bshall\b": "must, should",
    r"\bby hand of\b|\bto other ends\b": "say what happens",
    r"\b(?:page |segmentation )?faults?\b(?! tolerance| injection|handler)(?<!page fault)(?<!page faults)": (
        "issue (validator), failure (job), damage (file), bug (code)"
    ),
    r"\bparallel layouts?\b": "parallelism",
    r"\b(?:on|off) the grid\b|\bon-grid\b|\bon their grid\b": "representable, quantized",
    r"\bwhole (?:checkpoint|save|one)s?\b": "valid checkpoint, complete checkpoint",
    r"\bcarried (?:along|through|over|from)\b": "passed through unchanged",
    r"\bstands? (?:in|beside|on|under|for itself)\b": "is in, is listed in",
    r"\bgo(?:es)? on\b(?! to\b)": "continues, resumes",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bsearched away\b|\bsearched models?\b|\bseeing models?\b": "NAS, vision-language",
    r"\bthe spine\b": "the end-to-end pipeline",
    r"\bin words\b": "with an error",
    r"\bfive models of the report\b|\bthe report's (?:own )?(?:recipe|rate|setting)s?\b": "the paper",
    r"\bwhat suffers?\b|\bwhich layers suffer\b": "sensitive layers",
    r"\bis told\b|\bare told\b": "gets an error, receives",
    r"\bonce more\b": "again",
    r"\bthe way of the data\b|\bthe house\b|\bas they are$": "Workflow, Repository layout, Known limitations",
    r"\bfight(?:s|ing)? each other\b|\bthat fight\b": "conflict",
    r"\bof which are not told\b|\bnot told\b": "say who does what",
    r"\broomy\b|\bwhole_saves\b|\bWholeSaves\b": "the new name (CHANGELOG.md)",
}


def main() -> int:
    """Print every match as ``file:line: phrase -> replacement``; exit status 1 if there is one."""
    names = (
        sys.argv[1:]
        or subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    )
    rules = [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in RULES.items()]
    num_matches = 0
    for name in names:
        file = Path(name)
        if name in SKIPPED or file.suffix not in SUFFIXES or not file.is_file():
            continue
        for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.endswith("prose: ok"):
                continue
            if file.suffix == ".md":
                line = re.sub(r"`[^`]*`", "", line)  # code keeps its names
            for rule, advice in rules:
                for match in rule.finditer(line):
                    num_matches += 1
                    print(f"{name}:{i}: {match.group()!r}; write: {advice}")
    return 1 if num_matches else 0


if __name__ == "__main__":
    sys.exit(main())
