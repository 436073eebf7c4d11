#!/usr/bin/env bash
# Everything under results/ that the README shows, from data files of your own; each part resumes where it was stopped.
#   experiments/results.sh ARTICLES.jsonl.gz GSM8K-TRAIN.jsonl LAMBADA.jsonl PUBMED.jsonl WORK-FOLDER [PART ...]
# PART: laboratory mixed mixed-rank-512 mixed-smollm2 wikipedia-laboratory python-laboratory python python-rank-16 wikipedia figures; all if none.
# Two cores: hours.
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,5s/^# *//p' "$0" >&2; exit 2; }
articles=$1 gsm8k=$2 lambada=$3 pubmed=$4 work=$5
shift 5
parts=${*:-laboratory mixed mixed-rank-512 mixed-smollm2 wikipedia-laboratory python-laboratory python python-rank-16 wikipedia figures}
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

small=(--base "$work/laboratory/model" --encoder static --set threads=1 --min-tokens 4000 --set train.batch=4
    --set corpus.tune_fraction=0.08 --set corpus.test_fraction=0.15)
low=(--rank 16 --set train.alpha=16) # the defaults before 64
methods=base,trunk,merged,fine-tuned,null,merged-1,merged-3,uniform,ttt-trunk,ensemble
tuned=(--documents 300 --methods $methods --set 'fine_tune.batches=[]'
    --set ttt.documents=40 --set ttt.neighbours=100 --set ttt.rate=3e-3)
[ -f "$work/python.jsonl" ] || "$bin/python" experiments/python_corpus.py "$work/python.jsonl"

for part in $parts; do
    case $part in
    laboratory) [ -f "$work/laboratory/model/model.safetensors" ] ||
        "$bin/python" experiments/laboratory.py "$articles" "$work/laboratory" ;;
    mixed)
        mixed_corpus
        measure mixed "$work/mixed.jsonl" 50 256 "${small[@]}" "${low[@]}" --sample-tokens 1000000 --clusters 32 --learning-rate 1.2e-2 -- \
            "${tuned[@]}" --set fine_tune.tune_tokens=300000 ;;
    mixed-rank-512)
        mixed_corpus
        measure mixed-rank-512 "$work/mixed.jsonl" 50 256 "${small[@]}" --sample-tokens 1000000 --clusters 32 --learning-rate 1.5e-3 \
            --rank 512 --set train.alpha=512 -- "${tuned[@]}" --set fine_tune.tune_tokens=200000 ;;
    python-laboratory)
        measure python-laboratory "$work/python.jsonl" 100 256 "${small[@]}" "${low[@]}" --sample-tokens 1000000 --clusters 32 \
            --learning-rate 1.2e-2 -- \
            "${tuned[@]}" --set fine_tune.tune_tokens=300000 ;;
    wikipedia-laboratory)
        measure wikipedia-laboratory "$work/laboratory/corpus.jsonl" 50 256 "${small[@]}" --sample-tokens 1000000 --clusters 64 \
            --rank 256 --set train.alpha=256 --set corpus.tune_fraction=0.03 --set corpus.test_fraction=0.1 --learning-rate 1e-3 \
            --set search.tokens=100000 --try-rate 0.5 --try-rate 1 --try-rate 2 -- --documents 300 --set 'fine_tune.batches=[1]' \
            --set 'fine_tune.ranks=[64,512]' --set fine_tune.tune_tokens=200000 \
            --methods "${methods/ttt-trunk,/},merged-10,nearest,sift,members,context,ensemble-3,ensemble-10,fine-tuned-full" ;;
    mixed-smollm2)
        mixed_corpus
        measure mixed-smollm2 "$work/mixed.jsonl" 50 256 --base $base --sample-tokens 150000 --clusters 16 --min-tokens 4000 \
            --set corpus.tune_fraction=0.08 --set corpus.test_fraction=0.2 --set threads=1 -- --documents 250 \
            --set fine_tune.tune_tokens=25000 --set 'fine_tune.batches=[]' --methods base,trunk,merged,fine-tuned,null,merged-1,merged-3,uniform ;;
    python | python-rank-16)
        settings=("${low[@]}" --learning-rate 2e-3) asked=$methods
        [ "$part" = python-rank-16 ] || { settings=() asked=base,trunk,merged,fine-tuned,null; }
        measure "$part" "$work/python.jsonl" 100 256 --base $base "${settings[@]}" --sample-tokens 500000 --clusters 24 --min-tokens 8000 \
            --set corpus.tune_fraction=0.05 --set corpus.test_fraction=0.15 --set threads=1 -- --documents 300 \
            --set fine_tune.tune_tokens=50000 --set 'fine_tune.batches=[]' --set fine_tune.finalists=2 --methods "$asked" ;;
    wikipedia)
        measure wikipedia "$work/laboratory/corpus.jsonl" 50 256 --base $base --sample-tokens 1000000 --clusters 24 --min-tokens 6000 \
            --learning-rate 5e-4 --set corpus.tune_fraction=0.02 --set corpus.test_fraction=0.08 --set threads=1 -- --documents 300 \
            --set fine_tune.tune_tokens=100000 --set 'fine_tune.batches=[]' --set 'fine_tune.ranks=[128]' \
            --set ttt.rate=2.5e-4 --set 'ttt.rates=[0.5,1.0]' --set ttt.tune_documents=4 \
            --methods base,trunk,merged,fine-tuned,null,merged-1,ensemble,ttt-trunk
        "$bin/python" experiments/more_documents.py "$work/wikipedia-bank" results/wikipedia "$work/laboratory/corpus.jsonl" \
            -o results/wikipedia/more-documents.json --documents 1400 ;;
    figures) # the paper's figures and tables of the largest bank, and of small ones that differ in K and encoder
        "$bin/localmoe" eval "$work/wikipedia-laboratory-bank" -o results/wikipedia-laboratory --prefix 50 --length 256 --documents 60 \
            --figure all --set figure.overhead=results/overhead-answers.json --with results/python-rank-16 --with results/mixed-smollm2 --with results/wikipedia
        for other in "16 static" "8 static" "32 static" "16 all-MiniLM-L6-v2"; do
            read -r clusters encoder <<<"$other"
            "$bin/localmoe" build "$work/laboratory/corpus.jsonl" "$work/wikipedia-$clusters-$encoder-bank" --max-passage 256 \
                --set corpus.passages_per_document=1 --base "$work/laboratory/model" --encoder "$encoder" --clusters "$clusters" \
                --sample-tokens 250000 --min-tokens 4000 --set corpus.tune_fraction=0.08 --set corpus.test_fraction=0.3 \
                "${low[@]}" --learning-rate 6e-3 --set train.batch=4 --set train.expert_rate=1 --set threads=1
        done
        few=("$work/wikipedia-16-static-bank" -o results/wikipedia-laboratory-250k --prefix 50 --length 256 --documents 300)
        "$bin/localmoe" eval "${few[@]}" --figure 1-right --with "$work/wikipedia-8-static-bank" --with "$work/wikipedia-32-static-bank"
        "$bin/localmoe" eval "${few[@]}" --figure encoders --with "$work/wikipedia-16-all-MiniLM-L6-v2-bank"
        "$bin/localmoe" build "$work/python.jsonl" "$work/python-32-bank" --max-passage 256 --set corpus.passages_per_document=1 --base $base \
            "${low[@]}" --learning-rate 2e-3 --sample-tokens 500000 --clusters 32 --min-tokens 6000 --set corpus.tune_fraction=0.05 --set corpus.test_fraction=0.15 --set threads=1
        "$bin/localmoe" eval "$work/python-rank-16-bank" -o results/python-rank-16 --prefix 100 --length 256 --documents 300 \
            --figure 1-right --with "$work/python-32-bank" --set 'figure.active=[3]'
        "$bin/localmoe" eval "$work/python-rank-16-bank" -o results/python-rank-16 --prefix 100 --length 256 --documents 300 \
            --figure 1-left --figure table-1 --with results/wikipedia-laboratory
        "$bin/python" experiments/map.py results/*/results.json -o docs/where-experts-pay.svg ;;
    *) echo "no part is called $part" >&2; exit 2 ;;
    esac
done
