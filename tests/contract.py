"""The contract of each callback, as people run it: bar and table on, in each of `SETTINGS`

`python tests/contract.py --all` is the soak: every callback in every setting, every pair, in a notebook, in
two processes. test_contract.py takes a sample of each."""
import argparse, contextlib, gc, io, itertools, os, random, signal, sys, tempfile, time, traceback, warnings
from collections import Counter
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
from fastai.callback import rnn
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fastcore.foundation import L
from fastcore.xtras import working_directory
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.base.core import from_all
from common import (FREE, RNN, exit_code, export, finite, learner, make, public_callbacks, read_any_size,
                    suit, traces)
from crash import digests, flat
from settings import SETTINGS

callbacks = public_callbacks()
PROPERTIES = {}
def prop(f): return PROPERTIES.setdefault(f.__name__, f)

# --- a callback in a setting --------------------------------------------------------------------
# fastai's learners for text bring its own callbacks of these jobs:
TEXT = ('language_model', 'text_classifier')
FASTAIS = [rnn.ModelResetter, rnn.RNNCallback, rnn.RNNRegularizer]
IS_RNN = *RNN, ext.RNNRegularizer
# What fastai itself cannot do there
FASTAI_CANNOT = {('exports','torch_loader'), ('exports','list_of_batches'), ('exports','gan')}

# They do not know the loss of a GAN; labels that are mixed have no second loss. Word ids and categories are
# not mixed, and multi_label has fastai's `MixUp`
CANNOT = {(ext.Distill,'gan'), (ext.RDrop,'gan'), (ext.FGM,'gan'), (ext.ScheduleFree,'gan'),
          (ext.RDrop,'multi_label')}
MIXING = 'MixUp','CutMix','CutMixUp'
NOT_MIXED = *TEXT,'tabular_classes','ratings','multi_label','gan'
IMAGES = 'CutMix','CutMixUp'
PICTURES = 'digits','classifier','multi_label','unet'
def possible(cls):
    "The settings in which `cls` can work"
    name = cls.__name__
    cannot = {s for c,s in CANNOT if c is cls} | {*(NOT_MIXED if name in MIXING else ())}
    if name in IMAGES: cannot |= {'torch_loader','list_of_batches'}
    if name=='ProgressiveResize': return [s for s in SETTINGS if s in PICTURES]
    if name=='SeqLenSchedule': return list(TEXT)
    return [s for s in SETTINGS if s not in cannot and (s in TEXT or cls not in IS_RNN)]
TWO_PASSES = ext.SAM, ext.AWP, ext.FGM
def together(a, b):
    """Of two that mix, one for images and one for texts, or two of two passes, the first batch is refused.

    `HyperMult` wants groups of PyTorch's optimizers, and with frozen statistics a new net learns slowly"""
    mixing,free = {getattr(ext, o) for o in MIXING},{ext.ScheduleFree}
    of_texts = {*IS_RNN, ext.SeqLenSchedule}
    refused = ((mixing, mixing), (mixing, {*of_texts, ext.RDrop}), ({ext.ProgressiveResize}, of_texts),
               (TWO_PASSES, TWO_PASSES), (free, {ext.HyperMult, ext.BnFreeze}))
    return not any(o in one and p in other for one,other in refused for o,p in ((a,b), (b,a)))
def checks_in(setting): return {k: f for k,f in PROPERTIES.items() if (k,setting) not in FASTAI_CANNOT}

def learner_of(cls, setting, *cbs):
    "The learner of `setting` with `cbs`, and with what callbacks of class `cls` need"
    learn = SETTINGS[setting](cbs=[])
    if cls is ext.ScheduleFree: learn.opt_func = FREE
    if cls is ext.ProgressiveResize: read_any_size(learn)
    if cls in IS_RNN:
        learn.remove_cbs(FASTAIS)
        learn.add_cbs([o() for o in RNN if o is not cls])
    return suit(learn.add_cbs(cbs))

@contextlib.contextmanager
def unseen():
    "What a console would show is not shown"
    with contextlib.redirect_stdout(io.StringIO()) as out: yield out

def train(learn, cbs=None):
    "Two epochs: of `fine_tune`, or of `fit` where the learner's own callbacks freeze and unfreeze"
    suit(learn, *L(cbs))
    with unseen():
        if hasattr(learn, 'gan_trainer'): learn.fit(2, 1e-3, cbs=cbs)
        else: learn.fine_tune(1, 1e-2, cbs=cbs)
    return learn

class Stop(Callback):
    "Ends the run in its `n`th training batch"
    order,seen = 3000,0
    def __init__(self, n, how=None): self.n,self.how = n,how
    def after_batch(self):
        if not self.training: return
        self.seen += 1
        if self.seen!=self.n: return
        if self.how=='kill': os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt

# --- what must hold -----------------------------------------------------------------------------
def preds_of(learn, dl=None):
    set_seed(0)
    with unseen(): return learn.get_preds(dl=dl, reorder=False)[0]

@prop
def trains(cls, setting):
    "Twice, with the same callback"
    cb = make(cls)
    learn = train(learner_of(cls, setting, cb))
    assert finite(learn) and learn.recorder.values
    learn.remove_cb(cb)
    train(learn, cb)
    assert finite(learn) and cb.learn is None and not cb._scopes

@prop
def sleeps_outside_a_fit(cls, setting):
    "`validate`, `get_preds` and `lr_find` change nothing, and nothing is said"
    learn = learner_of(cls, setting, cb := make(cls))
    before = {k: v.clone() for k,v in learn.model.state_dict().items()}
    with unseen() as out:
        if setting!='gan':      # it has no validation
            learn.validate()
            learn.lr_find(show_plot=False, num_it=3, suggest_funcs=None)
        if setting not in ('gan','torch_loader','list_of_batches'): assert preds_of(learn).isfinite().all()
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), f'{k} has changed'
    assert cb.records==[] and f'{cb.name}:' not in out.getvalue()

def _left(learn, cbs):
    "What an interrupted fit leaves; of open files and threads how many more, since older ones may end in it"
    gc.collect()
    before = traces(learn)
    learn.add_cb(stop := Stop(2))
    with contextlib.suppress(KeyboardInterrupt): train(learn, cbs)
    learn.remove_cb(stop)
    for wait in (0, .1, .5, 2):      # data workers take their time to end
        time.sleep(wait)
        gc.collect()
        after = traces(learn)
        more = {k: max(0, after[k]-before[k]) for k in ('files','threads')}
        if not any(more.values()): break
    return after | more

@prop
def leaves_no_trace(cls, setting):
    "An interrupted fit leaves what it leaves without the callback"
    want = _left(learner_of(cls, setting), [rnn.RNNCallback()] if cls is ext.RNNCallback else [])
    learn = learner_of(cls, setting)
    left = _left(learn, [make(cls)])
    left['attrs'] |= {'smooth_loss'} & want['attrs']       # the recorder's, from the first step on
    assert left==want, {k: (left[k], want[k]) for k in want if left[k]!=want[k]}

@prop
def exports(cls, setting):
    "What is loaded predicts the same"
    learn = train(learner_of(cls, setting, make(cls)))
    dl = learn.dls.valid
    want = preds_of(learn, dl)
    export(learn, 'export.pkl')
    loaded = load_learner('export.pkl', cpu=not torch.cuda.is_available())
    assert any(type(cb) is cls for cb in loaded.cbs)
    torch.testing.assert_close(preds_of(loaded, dl), want)

STEADY = {ext.TimeLimit: dict(schedule=False)}      # a schedule by the clock is never twice the same
IN_RANKS = {ext.Freeze: dict(schedule={0: '*bias*'})}       # with several entries, it is refused there

def _run(cls, setting, folder, stop=None, how=None, ranks=False):
    "The learner after a run with checkpoints in `folder`"
    cbs = [ext.Checkpoint(folder, steps=2, background=False, seed_items=setting=='classifier')]
    kwargs = (STEADY | IN_RANKS if ranks else STEADY).get(cls, {})
    if cls is not ext.Checkpoint: cbs.insert(0, make(cls, **kwargs))
    learn = learner_of(cls, setting, *cbs, Stop(stop, how))
    with learn.distrib_ctx(sync_bn=False) if ranks else contextlib.nullcontext(): return train(learn)

def _differ(got, want):
    got,want = digests(got),digests(want)
    return [k for k in want if got[k]!=want[k]]

@prop
def goes_on(cls, setting, how='interrupt'):
    "A run that was stopped somewhere ends with the bits of one that was not"
    want = _run(cls, setting, tempfile.mkdtemp(dir='.'))
    folder,stop = tempfile.mkdtemp(dir='.'),random.Random(f'{cls.__name__} {setting}').randint(3, 7)
    if how=='kill':
        code = exit_code(lambda: _run(cls, setting, folder, stop, how))
        assert code==-signal.SIGKILL, 'ended before it was killed'
    else:
        with contextlib.suppress(KeyboardInterrupt): _run(cls, setting, folder, stop)
    differ = _differ(_run(cls, setting, folder), want)
    assert not differ, f"other {', '.join(differ)}, stopped in batch {stop}"

def holds_in_ranks(cls):
    "Under `distrib_ctx`: the same weights everywhere; an interrupted run goes on to the same bits"
    setting = usual(cls)
    path = Path.cwd()/cls.__name__      # one folder for all
    want = _run(cls, setting, path/'whole', ranks=True)
    with contextlib.suppress(KeyboardInterrupt): _run(cls, setting, path/'in_parts', 3, ranks=True)
    differ = _differ(_run(cls, setting, path/'in_parts', ranks=True), want)
    weights = from_all(list(flat([p.detach() for p in want.model.parameters()])))
    assert all(w==weights[0] for w in weights), 'other weights'
    assert not differ, f"other {', '.join(differ)}"

def pair(a, b):
    "Two callbacks together learn"
    learn = learner(a, b)
    with unseen(): learn.fit(2)
    assert finite(learn)
    first,second = [v[0] for v in learn.recorder.values]
    assert second<first, f'losses {first} and {second}'

# --- samples ------------------------------------------------------------------------------------
def sample(seed=0):
    "Each callback in one setting; each setting is taken, the rarest first"
    r,taken = random.Random(seed),Counter()
    for cls in r.sample(callbacks, len(callbacks)):
        setting = min(r.sample(possible(cls), len(possible(cls))), key=taken.__getitem__)
        taken[setting] += 1
        yield cls,setting

def sample_pairs(seed=0, steps=(1,)):
    "Each callback beside as many others as there are `steps`, on both sides, round a table"
    table = random.Random(seed).sample(callbacks, len(callbacks))
    others = {cls: [o for o in table[i+1:]+table[:i] if together(cls, o)] for i,cls in enumerate(table)}
    return [(cls, others[cls][k-1]) for cls in table for k in steps]

def usual(cls): return 'text_classifier' if cls in (*IS_RNN, ext.SeqLenSchedule) else 'digits'

# --- in a notebook ------------------------------------------------------------------------------
def in_notebook(names, folder, *more, seconds=600):
    "A notebook that ran `trains` and `goes_on` for the callbacks called `names`, then `more`, in a kernel"
    import nbformat
    from nbclient import NotebookClient
    here = str(Path(__file__).parent)
    start = f'import sys; sys.path.insert(0, {here!r})\nimport contract\nfrom contract import ext'
    calls = [f'(ext.{o}, {usual(getattr(ext, o))!r})' for o in names]
    each = [f'contract.{check}{call}' for call in calls for check in ('trains','goes_on')]
    cells = [nbformat.v4.new_code_cell(o) for o in (start, *each, *more)]
    nb = nbformat.v4.new_notebook(cells=cells)
    resources = {'metadata': {'path': str(folder)}}
    NotebookClient(nb, timeout=seconds, allow_errors=True, resources=resources).execute()
    return nb

def notebook_problems(nb):
    "What went wrong in the cells after the first, by cell; a cell without a table had no bar"
    for c in nb.cells:
        errors = [f"{o['ename']}: {o['evalue']}" for o in c.outputs if o.output_type=='error']
        shown = any('text/html' in o.get('data', {}) for o in c.outputs)
        if errors or (c is not nb.cells[0] and not shown): yield c.source,*errors

# --- the soak -----------------------------------------------------------------------------------
def attempt(f, *args, **kwargs):
    "'', or what went wrong"
    try: f(*args, **kwargs)
    except KeyboardInterrupt: raise
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        said = ' '.join(str(e).split())[:200]
        return f'{type(e).__name__}: {said} ({Path(where.filename).name}:{where.lineno})'
    return ''

def soak(classes, settings):
    "Try everything; prints a table of how much held, and gives what did not"
    tried = {}
    for cls in classes:
        for setting in settings:
            if setting not in possible(cls): continue
            checks = checks_in(setting) | {'survives_a_kill': partial(goes_on, how='kill')}
            tried[cls.__name__,setting] = {name: attempt(f, cls, setting) for name,f in checks.items()}
    width = max(map(len, settings))
    print('\n' + ' '*24 + ' '.join(f'{s:>{width}}' for s in settings))
    def held(*key): return f"{[*tried[key].values()].count('')} of {len(tried[key])}" if key in tried else '-'
    for cls in classes:
        print(f'{cls.__name__:24}' + ' '.join(f'{held(cls.__name__, s):>{width}}' for s in settings))
    return [f'{cls} in {setting}, {name}: {p}' for (cls,setting),ps in tried.items()
            for name,p in ps.items() if p]

def soak_pairs(classes):
    found = {f'{a.__name__} and {b.__name__}': attempt(pair, a, b)
             for a,b in itertools.combinations(classes, 2) if together(a, b)}
    problems = [f'{k}: {p}' for k,p in found.items() if p]
    print(f'{len(found)-len(problems)} of {len(found)} pairs learn')
    return problems

def soak_notebook(classes):
    nb = in_notebook([o.__name__ for o in classes], Path.cwd(), seconds=3600)
    problems = [': '.join(o) for o in notebook_problems(nb)]
    print(f'{len(classes)-len(problems)} of {len(classes)} callbacks hold in a notebook')
    return problems

def soak_ranks(classes):
    from ranks import launch
    found = launch(2, Path(tempfile.mkdtemp()), 3600, contract=[o.__name__ for o in classes])['contract']
    problems = [f"{o.__name__} in two processes: {' / '.join(ps)}" for o in classes
                if any(ps := [rank[o.__name__] for rank in found])]
    print(f'{len(classes)-len(problems)} of {len(classes)} callbacks hold in two processes')
    return problems

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--all', action='store_true', help='everything; otherwise the sample of --seed')
    p.add_argument('--callbacks', nargs='+', help='only these', default=[o.__name__ for o in callbacks])
    p.add_argument('--settings', nargs='+', help='only these', default=list(SETTINGS), choices=list(SETTINGS))
    p.add_argument('--parts', nargs='+', default=['settings','pairs','notebook','ranks'])
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    torch.set_num_threads(1)
    start,classes,problems = time.time(),[getattr(ext, o) for o in args.callbacks],[]
    with tempfile.TemporaryDirectory() as folder, working_directory(folder):
        if 'settings' in args.parts and args.all: problems += soak(classes, args.settings)
        elif 'settings' in args.parts:
            for cls,setting in sample(args.seed): problems += soak([cls], [setting])
        if 'pairs' in args.parts: problems += soak_pairs(classes)
        if 'notebook' in args.parts: problems += soak_notebook(classes)
        if 'ranks' in args.parts: problems += soak_ranks(classes)
    print(*problems, f'{len(problems)} problems in {time.time()-start:.0f} s', sep='\n')
    sys.exit(bool(problems))

if __name__=='__main__': main()
