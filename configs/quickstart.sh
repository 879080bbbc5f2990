# The main job, end to end: text, tokenizer, corpus, training with an interruption, samples, export.
set -eu
run=runs/quickstart
corpus=corpora/python
export=exports/quickstart

# Two copies of the model, as in the config, unless one GPU is all there is.
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l)
dp=2
[ "$gpus" != 1 ] || dp=1

say() { printf '\n== %s\n' "$*"; }

say "1/6  A tokenizer, from the sources and documentation topics of Python's standard library"
[ -e $corpus.model ] || triplane tokenizer train python-stdlib --out $corpus.model --vocab-size 4096

say "2/6  Token shards: WebDataset tars with index and manifest, 2 % held out"
triplane prepare python-stdlib --out $corpus --tokenizer $corpus.model

say "3/6  Training on $dp ranks, stopped half-way as an interruption would"
triplane train configs/quickstart.toml parallel.dp=$dp training.stop_at_step=160

say "4/6  Started again, the run goes on from its checkpoint"
triplane train configs/quickstart.toml parallel.dp=$dp
triplane evaluate $run --sequences 64

say "5/6  A sample"
triplane generate $run --prompt "def " --tokens 64

say "6/6  A Hugging Face folder, published only if its logits equal ours"
[ -e $export ] || triplane export $run $export --dtype fp32

cat <<END

Corpus       $corpus (triplane inspect $corpus)
Run          $run (triplane inspect $run)
Report       $run/report.html
Export       $export

Next:
  .venv/bin/triplane board $run
  .venv/bin/triplane train configs/quickstart.toml run_dir=runs/tp2-pp2 parallel.dp=1 parallel.tp=2 parallel.pp=2
  .venv/bin/triplane train configs/125m.toml        # on a GPU, once corpora/web is prepared
END
