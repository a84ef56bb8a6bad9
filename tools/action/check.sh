#!/usr/bin/env bash
# The steps of action.yml: the same check in three forms, and its exit code.
#
# Reads FOLDER, POLICY, JUNIT, and, where they are not empty, EVIDENCE and ORIGINAL; appends to
# GITHUB_STEP_SUMMARY where that is set.
set -uo pipefail

check=(kvw check "$FOLDER" --policy "$POLICY")
[ -z "${EVIDENCE:-}" ] || check+=(--evidence "$EVIDENCE")
[ -z "${ORIGINAL:-}" ] || check+=(--original "$ORIGINAL")

"${check[@]}" --format junit > "$JUNIT"
"${check[@]}" --format markdown >> "${GITHUB_STEP_SUMMARY:-/dev/null}"
exec "${check[@]}" --format github
