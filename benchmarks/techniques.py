"""Final metric with and without each technique of the pages on gradients and averaging: digits and the demo's
language model, five seeds

Results are noted in results/techniques.jsonl as they are found: a run that was stopped goes on from there.
"""
import json, platform, sys, time, warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
from fastai.callback.all import *
from fastai_callbacks_ext.all import (EMA, LAWA, SAM, SWA, GradientCentralization, GradientClip,
                                      GradientNoise, LookaheadWeights, rnn_cbs)
from fastai_callbacks_ext.test_utils import digits_learner
from harness import facts, noted, run_noted, seeds_options, seeds_table
sys.path.insert(0, str(Path(__file__).parents[1]/'examples'))
import language_model

FILE = Path(__file__).parent/'results/techniques.json'
PLAIN = 'plain'
GRADIENTS = {
    'SAM(0.05)': lambda: SAM(),
    'SAM(1, adaptive=True)': lambda: SAM(1., adaptive=True),
    'GradientCentralization()': GradientCentralization,
    'GradientNoise(1e-6)': lambda: GradientNoise(1e-6),
    'GradientNoise(0.01)': GradientNoise,
    'LookaheadWeights()': LookaheadWeights,
    'GradientClip(1)': GradientClip,
    'GradientClip(adaptive=0.1)': lambda: GradientClip(adaptive=0.1),
    'GradientClip(auto=50)': lambda: GradientClip(auto=50)}
raw = dict(validate='raw', final='raw')
AVERAGING = {     # these leave the training alone: one run for all
    'EMA(0.9)': lambda: EMA(0.9, **raw),
    'EMA(0.98)': lambda: EMA(0.98, **raw),
    'EMA(0.995)': lambda: EMA(0.995, **raw),
    'SWA(0.5, every=10)': lambda: SWA(0.5, every=10, **raw),
    'LAWA(5, every=10)': lambda: LAWA(5, every=10, **raw)}

@cache
def corpus():
    language_model.set_seed(42)
    return language_model.Corpus(None)

def digits(seed, cbs): return digits_learner(cbs, seed=seed)
def language(seed, cbs):
    cbs = rnn_cbs(language_model.ALPHA, language_model.BETA) + cbs
    return language_model.language_learner(corpus(), 'small', seed, cbs)

TASKS = {   # title: unit, larger is better, learner, fit, what else to train than the plain run
    'Digits, 8 epochs, one cycle':
        ('accuracy', True, digits, lambda o: o.fit_one_cycle(8, 1e-2), GRADIENTS),
    'Digits, 20 epochs at a constant learning rate of 0.03':
        ('accuracy', True, digits, lambda o: o.fit(20, 3e-2), GRADIENTS),
    'Language model, 3 epochs, one cycle':
        ('perplexity', False, language, lambda o: o.fit_one_cycle(3, language_model.LR), GRADIENTS),
    'Language model, 3 epochs at a constant learning rate':
        ('perplexity', False, language, lambda o: o.fit(3, language_model.LR/2), {})}

def value(learn):
    "The metric of `learn` on the validation set"
    with learn.no_bar(): return learn.validate()[1]

def train(task, seed, cbs):
    _,_,make,fit,_ = TASKS[task]
    learn = make(seed, cbs)
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn

def found(task, seed, technique):
    "The metric by technique; for the plain run, with that of each average of it"
    if technique!=PLAIN: return {technique: value(train(task, seed, [GRADIENTS[technique]()]))}
    cbs = {k: f() for k,f in AVERAGING.items()}
    learn,res = train(task, seed, list(cbs.values())),{}
    res[PLAIN] = value(learn)
    for k,cb in cbs.items():
        with cb.using(cb.average_name): res[k] = value(learn)
    return res

def report(seeds):
    "Print the tables, and write them"
    def table(unit, larger, _, __, others):
        return dict(unit=unit, larger_is_better=larger,
                    rows={k: [None]*seeds for k in (PLAIN, *others, *AVERAGING)})
    tables = {task: table(*o) for task,o in TASKS.items()}
    for task,seed,_,values in noted(FILE):
        for k,v in values.items(): tables[task]['rows'][k][seed] = v
    versions = {'Python':platform.python_version()} | {p:version(p) for p in ('torch','fastai')}
    here = dict(gradients=list(GRADIENTS), averaging=list(AVERAGING))
    results = dict(date=time.strftime('%Y-%m-%d'), versions=versions, machine=f'{platform.machine()} CPU',
                   threads=1, here=here, tables=tables)
    FILE.write_text(json.dumps(results, indent=1)+'\n')
    FILE.with_suffix('.jsonl').unlink()
    print(facts(results))
    for title,t in tables.items(): print(f'\n{title}\n\n{seeds_table(t, list(t["rows"]))}')

def main():
    args = seeds_options(__doc__).parse_args()
    jobs = [(task, seed, technique) for seed in range(args.seeds)
            for task,(*_,others) in TASKS.items() for technique in (PLAIN, *others)]
    run_noted(found, jobs, FILE, args.processes)
    report(args.seeds)

if __name__=='__main__': main()
