#!/usr/bin/env bash
# Everything under results/ that the README shows, from data files of your own; each part resumes where it was stopped.
#   experiments/results.sh ARTICLES.jsonl.gz GSM8K-TRAIN.jsonl LAMBADA.jsonl PUBMED.jsonl WORK-FOLDER [PART ...]
# PART: laboratory mixed mixed-smollm2 wikipedia-laboratory python-laboratory python wikipedia; all of them if none is given. Two cores: hours.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,4s/^# *//p' "$0" >&2; exit 2; }
articles=$1 gsm8k=$2 lambada=$3 pubmed=$4 work=$5
shift 5
parts=${*:-laboratory mixed mixed-smollm2 wikipedia-laboratory python-laboratory python wikipedia}
bin=${BIN:-.venv/bin}
base=HuggingFaceTB/SmolLM2-135M-Instruct
mkdir -p "$work"

measure() { # name, corpus, prefix, length, settings of the build ... -- settings of the evaluation ...
    local name=$1 corpus=$2 prefix=$3 length=$4 build=()
    shift 4
    while [ "$1" != -- ]; do build+=("$1"); shift; done
    shift
    "$bin/localmoe" build "$corpus" "$work/$name-bank" --max-passage "$length" --set corpus.passages_per_document=1 "${build[@]}"
    "$bin/localmoe" eval "$work/$name-bank" -o "results/$name" --prefix "$prefix" --length "$length" "$@"
}

mixed_corpus() { # five kinds of text, of which the laboratory model has seen none
    [ -f "$work/mixed.jsonl" ] || "$bin/python" experiments/mixed_corpus.py "$work/mixed.jsonl" "$work/laboratory/corpus.jsonl:text" \
        "$work/python.jsonl:text" "$gsm8k:question+answer" "$lambada:context" "$pubmed:context"
}

trunk=(--recipe trunk --active 3 --base "$work/laboratory/model" --encoder static --min-tokens 4000 --set threads=1
    --set corpus.tune_fraction=0.08 --set corpus.test_fraction=0.3) # as these were built, before there was recipe joint
small=(--base "$work/laboratory/model" --encoder static --rank 8 --set train.alpha=8 --set threads=1
    --set corpus.tune_fraction=0.08 --set corpus.test_fraction=0.3 --set search.tokens=100000 --try-rate 0.5 --try-rate 1 --try-rate 2)
methods=base,trunk,merged,fine-tuned,null,merged-1,merged-3,uniform,ttt-trunk,ensemble,ttt-fine-tuned
tuned=(--documents 300 --set fine_tune.tune_tokens=100000 --set 'fine_tune.ranks=[16]' --methods $methods
    --set ttt.documents=40 --set ttt.neighbours=100 --set ttt.rate=3e-3)
earlier=base,trunk,merged,fine-tuned,merged-1,uniform,null,ensemble
before=(--documents 300 --set fine_tune.tune_tokens=100000 --set ttt.documents=40 --set ttt.neighbours=100 --set ttt.rate=3e-3)
[ -f "$work/python.jsonl" ] || "$bin/python" experiments/python_corpus.py "$work/python.jsonl"

for part in $parts; do
    case $part in
    laboratory) [ -f "$work/laboratory/model/model.safetensors" ] ||
        "$bin/python" experiments/laboratory.py "$articles" "$work/laboratory" ;;
    mixed)
        mixed_corpus
        measure mixed "$work/mixed.jsonl" 50 256 "${trunk[@]}" --sample-tokens 300000 --clusters 12 --rank 4 --set train.alpha=4 \
            --learning-rate 8e-3 --set train.batch=4 --set search.tokens=100000 --try-rate 0.5 --try-rate 1 --try-rate 2 -- "${before[@]}" \
            --methods "$earlier,merged-10,ttt-trunk" ;;
    wikipedia-laboratory)
        measure wikipedia-laboratory "$work/laboratory/corpus.jsonl" 50 256 "${small[@]}" --clusters 128 --min-tokens 4000 \
            --set corpus.tune_fraction=0.05 --set corpus.test_fraction=0.1 --learning-rate 6e-3 --set train.batch=4 -- "${tuned[@]}" \
            --set fine_tune.tune_tokens=600000 --set 'fine_tune.rates=[1.0,2.0]' --set 'fine_tune.batches=[]' ;;
    python-laboratory)
        measure python-laboratory "$work/python.jsonl" 100 256 "${trunk[@]}" --sample-tokens 400000 --clusters 8 \
            --learning-rate 8e-3 -- "${before[@]}" --methods "$earlier" ;;
    mixed-smollm2)
        mixed_corpus
        measure mixed-smollm2 "$work/mixed.jsonl" 50 256 --base $base --sample-tokens 150000 --clusters 16 --min-tokens 4000 \
            --set corpus.tune_fraction=0.08 --set corpus.test_fraction=0.2 --set threads=1 -- --documents 250 \
            --set fine_tune.tune_tokens=25000 --methods $methods --set ttt.documents=40 --set ttt.neighbours=15 --set ttt.rate=5e-4 ;;
    python)
        measure python "$work/python.jsonl" 100 256 --base $base --sample-tokens 500000 --clusters 24 --min-tokens 8000 \
            --set corpus.tune_fraction=0.05 --set corpus.test_fraction=0.15 --set threads=1 -- --documents 300 \
            --set fine_tune.tune_tokens=50000 --methods $methods --set ttt.documents=40 --set ttt.neighbours=25 --set ttt.rate=1e-3 ;;
    wikipedia)
        measure wikipedia "$work/laboratory/corpus.jsonl" 50 256 --base $base --sample-tokens 400000 --clusters 24 --min-tokens 6000 \
            --learning-rate 1e-3 --set train.expert_rate=0.25 --set corpus.tune_fraction=0.03 --set corpus.test_fraction=0.1 --set threads=1 -- --documents 300 \
            --set fine_tune.tune_tokens=40000 --methods base,trunk,merged,fine-tuned,null,merged-1 ;;
    *) echo "no part is called $part" >&2; exit 2 ;;
    esac
done
