#!/usr/bin/env bash
# Reports known vulnerabilities of the packages in requirements.lock, by `uv audit` and the OSV database. It always
# succeeds, because its result changes without a commit and not every machine can reach the database.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly MAX_SECONDS=120

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pins() { sed -nE 's/^([a-z0-9][^\\]*[^\\ ]) *\\?$/#   "\1",/p' requirements.lock; }

# uv audits a project or a script, so the lock becomes the inline metadata of a script. The overrides keep exactly these
# versions, although some packages require others (see pyproject.toml).
printf '# /// script\n# requires-python = ">=3.11,<3.14"\n# dependencies = [\n%s\n# ]\n# [tool.uv]\n%s\n%s\n# ]\n# ///\n' \
    "$(pins)" "# override-dependencies = [" "$(pins)" >"$folder/lock.py"

echo "audit: $(pins | wc -l) packages of requirements.lock"
if ! timeout "$MAX_SECONDS" scripts/setup.sh uv audit --quiet --preview-features audit --script "$folder/lock.py"; then
    echo "audit: see above; to fix a vulnerability, run 'make lock UPGRADE=\"--upgrade-package NAME\"'." \
        "If the database cannot be reached, run this on another machine."
fi
