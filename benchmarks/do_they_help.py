"""Each technique on five small tasks, five seeds, beside the plain fit of the same seed

Nothing is tuned for a task but the learning rates of the plain fits. Results are noted in
results/do_they_help.jsonl as they are found: a run that was stopped goes on from there.
"""
import contextlib, io, json, platform, time, warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
warnings.filterwarnings('ignore')

from fastai.basics import *
from fastai.callback.all import *
from fastai_callbacks_ext.all import (AWP, EMA, FGM, LAWA, SAM, SWA, BnFreeze, CutMix, CutMixUp, Distill,
                                      Freeze, GradientCentralization, GradientClip, GradientNoise, HyperMult,
                                      LookaheadWeights, MixUp, RDrop, ReduceLROnPlateau, Schedule,
                                      ScheduleFree, layer_groups)
from fastai_callbacks_ext.test_utils import FreeSGD
from harness import facts, gains_table, noted, run_noted, seeds_options
from tasks import LACKS, TASKS

FILE = Path(__file__).parent/'results/do_they_help.json'

class FreeAdam(FreeSGD):
    "Schedule-free Adam by the formulas of Defazio et al. (2024), with a warm-up of 20 steps"
    total = 0
    @torch.no_grad()
    def step(self, closure=None):
        self.train()
        for g in self.param_groups:
            g['k'] += 1
            k,b = g['k'],g['momentum']
            lr = g['lr']*min(1, k/20)
            self.total += lr**2
            for p in g['params']:
                if p.grad is None: continue
                state = self.state[p]
                z,v = state.setdefault('z', p.clone()),state.setdefault('v', torch.zeros_like(p))
                v.mul_(.99).addcmul_(p.grad, p.grad, value=.01)
                x = p.lerp(z, 1-1/b)
                z.sub_(p.grad/((v/(1-.99**k)).sqrt()+1e-5)+g['weight_decay']*p, alpha=lr)
                p.copy_(x.lerp_(z, lr**2/self.total).lerp(z, 1-b))

class Technique(NamedTuple):
    cbs: object             # Makes callbacks, of the task's name and the seed
    needs: str = ''         # What a task must have: a key of `LACKS`
    more: dict = {}         # Arguments of `Learner`
    rate: str = 'lr'        # At which rate of the task

class Block(NamedTuple):
    plain: str              # Title of the block that has the plain fit with which these are compared
    fit: str                # How they are trained
    techniques: dict

def plainly(f, needs='', **more): return Technique(lambda *_: f(), needs, more)
def mixing(cls, needs='images', **kwargs):
    return Technique(lambda name,_: cls(inputs=TASKS[name].inputs, **kwargs), needs)

groups,schedule_free = layer_groups(decay=.75),partial(OptimWrapper, opt=FreeAdam)
averages = {'EMA()': plainly(EMA), 'SWA()': plainly(SWA), 'LAWA()': plainly(LAWA)}
ONE,FIT = 'Added to `fit_one_cycle`','Added to `fit` at a constant rate'
BLOCKS = {      # one more technique is one more line
    ONE: Block(ONE, 'fit_one_cycle', {
        'GradientClip(1)': plainly(lambda: GradientClip(1.)),
        'GradientClip(auto=10)': plainly(lambda: GradientClip(auto=10)),
        'GradientCentralization': plainly(GradientCentralization),
        'GradientNoise(1e-6)': plainly(lambda: GradientNoise(1e-6)),
        'LookaheadWeights()': plainly(LookaheadWeights),
        'SAM(0.05)': plainly(lambda: SAM(.05)),
        'SAM(1, adaptive)': plainly(lambda: SAM(1., adaptive=True)),
        'AWP(0.01)': plainly(lambda: AWP(.01)),
        'FGM(1)': plainly(lambda: FGM(1.), 'words'),
        'RDrop(1)': plainly(lambda: RDrop(1.)),
        'Distill(teacher)': Technique(lambda *o: Distill(teacher(*o))),
        'MixUp(0.4)': mixing(MixUp, 'real', alpha=.4),
        'CutMix()': mixing(CutMix),
        'CutMixUp()': mixing(CutMixUp, until=.9),
        'HyperMult(groups)': plainly(lambda: HyperMult(groups), splitter=groups),
        'Freeze({...})': plainly(lambda: Freeze({0: -1, 3: -2, 6: 0}), 'body'),
        'BnFreeze()': plainly(BnFreeze, 'body'),
        'EMA()': averages['EMA()']}),
    'In place of `fit_one_cycle`': Block(ONE, 'fit', {
        'Schedule.wsd()': plainly(Schedule.wsd),
        'Schedule.linear()': plainly(Schedule.linear),
        'Schedule.cosine()': plainly(Schedule.cosine),
        'ScheduleFree()': plainly(ScheduleFree, opt_func=schedule_free)._replace(rate='free')}),
    FIT: Block(FIT, 'fit', {
        'ReduceLROnPlateau()': plainly(lambda: ReduceLROnPlateau(patience=2), 'epochs'),
        **averages})}
PLAIN,TEACHER,RUNS = 'plain','(the teacher)',3

def trained(learn, fit, *args):
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        getattr(learn, fit)(*args)
    return learn

class Together(nn.Module):
    "The mean output of several networks"
    def __init__(self, models): super().__init__(); self.models = nn.ModuleList(models)
    def reset(self):
        for m in self.models: getattr(m, 'reset', noop)()
    def forward(self, *xs):
        outs = [m(*xs) for m in self.models]
        return sum(o[0] if isinstance(o, tuple) else o for o in outs)/len(outs)

@cache
def teacher(name, seed, n=5):
    "Several networks, trained in the same way on the same items"
    task = TASKS[name]
    learns = [trained(task.learner(seed, 1000+seed+100*i), 'fit_one_cycle', task.epochs, task.lr)
              for i in range(n)]
    learn,model = learns[0],Together(o.model for o in learns)
    return Learner(learn.dls, model, loss_func=learn.loss_func, metrics=learn.metrics, cbs=ModelResetter())

def value(learn):
    "Loss and metric on the validation set"
    with learn.no_bar(), learn.no_logging(): return [round(float(o), 5) for o in learn.validate()]

def found(name, title, row, seed):
    "Loss and metric; for a plain fit, those of several runs with the same items and other weights"
    task,block = TASKS[name],BLOCKS[title]
    if row==TEACHER: return value(teacher(name, seed))
    def result(technique, run):
        learn = task.learner(seed, run, technique.cbs(name, seed), **technique.more)
        return value(trained(learn, block.fit, task.epochs, getattr(task, technique.rate)))
    if row==PLAIN: return [result(plainly(list), seed+100*i) for i in range(RUNS)]
    return result(block.techniques[row], seed)

def lacks(name, technique):
    "Why the technique is not for this task, if so"
    return next((why for k,why in LACKS.items() if k==technique.needs and k not in TASKS[name].has), None)

def rows():
    "Task, block and row of all that is trained"
    for name in TASKS:
        for title,block in BLOCKS.items():
            if title==block.plain: yield name,title,PLAIN
            yield from ((name, title, k) for k,o in block.techniques.items() if not lacks(name, o))
        yield name,ONE,TEACHER

def report(seeds):
    "Print the tables, and write them"
    values = {tuple(o[:4]): o[4] for o in noted(FILE)}
    def row(name, title, k, o):
        why = o and lacks(name, o)
        return why or [values[name, title, k, i] for i in range(seeds)]
    def block(title, b):
        named = b.techniques | ({TEACHER: None} if title==ONE else {})
        rows = {k: {name: row(name, title, k, o) for name in TASKS} for k,o in named.items()}
        return dict(title=title, plain=b.plain, rows=rows)
    blocks = [block(*o) for o in BLOCKS.items()]
    plain = {b.plain: {name: row(name, b.plain, PLAIN, None) for name in TASKS} for b in BLOCKS.values()}
    versions = {'Python':platform.python_version()} | {p:version(p) for p in ('torch','fastai')}
    results = dict(date=time.strftime('%Y-%m-%d'), versions=versions, machine=f'{platform.machine()} CPU',
                   threads=1, seeds=seeds, runs=RUNS, units={k: o.unit for k,o in TASKS.items()}, plain=plain,
                   blocks=blocks)
    FILE.write_text(json.dumps(results, ensure_ascii=False)+'\n', 'utf-8')
    FILE.with_suffix('.jsonl').unlink()
    print(facts(results))
    for o in blocks: print(f'\n{o["title"]}\n\n{gains_table(results, o)}')

def main():
    args = seeds_options(__doc__).parse_args()
    jobs = [(*o, seed) for seed in range(args.seeds) for o in rows()]
    run_noted(found, jobs, FILE, args.processes)
    report(args.seeds)

if __name__=='__main__': main()
