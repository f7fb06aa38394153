"""Runs that are killed with SIGKILL again and again, and must end with the bits of a run that was not.
`python tests/crash.py --kills 500` is the soak; test_crash.py takes a few of each kind."""
import argparse, contextlib, hashlib, itertools, json, os, random, shutil, signal, sys, tempfile, time
import traceback, warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
warnings.filterwarnings('ignore')

import numpy as np, torch, torch.distributed as dist
from fastai.basics import *
from fastai.callback.all import *
from fastai.callback.fp16 import MixedPrecision
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.data import LMDataLoader
from torch.nn.parallel import DistributedDataParallel
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.files import StateFiles
from fastai_callbacks_ext.test_utils import digits_learner, text_dls, text_learner, words

# What is trained
class CPUMixedPrecision(MixedPrecision):
    "fastai's, on a CPU too: bfloat16, with a loss scaler that grows every third step"
    def before_fit(self):
        device = self.dls.device.type
        self.autocast,self.scales = torch.autocast(device, dtype=torch.bfloat16),L()
        self.learn.scaler = torch.amp.GradScaler(device, init_scale=8., growth_interval=3)

def tabular(folder):
    "A tabular net with embeddings, batch norm and Adam, on the diabetes data"
    import pandas as pd
    from sklearn.datasets import load_diabetes
    x,y = load_diabetes(return_X_y=True, as_frame=True)
    df = x.assign(target=y.astype('float32')/100, sex=(x.sex>0).map({True:'a', False:'b'})).iloc[:200]
    set_seed(7)
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['sex'],
                                     cont_names=['age','bmi','bp','s1','s5'], y_names='target',
                                     valid_idx=list(range(40)), bs=32, num_workers=0)
    learn = tabular_learner(dls, layers=[20,10], config=dict(ps=.1, embed_p=.1), metrics=[mae],
                            cbs=ReduceLROnPlateau(patience=1))
    return learn,lambda cb: learn.fit_flat_cos(3, 1e-2, cbs=cb)

def cnn(folder):
    "A CNN with dropout, batch norm, MixUp and bfloat16, under FastLoop; both fits of fine_tune"
    learn = digits_learner([MixUp(), FastLoop(), CPUMixedPrecision()], n=250, bs=32)
    return learn,lambda cb: learn.fine_tune(2, 1e-2, cbs=cb)

def language(folder):
    "An AWD-LSTM with AR and TAR, on texts whose order is shuffled; training metrics are shown too"
    def dls():
        ws = words(2000)
        num = {w:i for i,w in enumerate(sorted(set(ws)))}
        texts = [torch.tensor([num[w] for w in ws[i:i+300]]) for i in range(0, 2000, 300)]
        dsets = Datasets(texts, [[noop]], splits=(range(1,7), [0]), dl_type=LMDataLoader)
        return dsets.dataloaders(bs=8, seq_len=20, num_workers=0)
    learn = text_learner(rnn_cbs(2, 1), n=2000)
    learn.dls,learn.recorder.train_metrics = dls(),True
    return learn,lambda cb: learn.fit_one_cycle(3, 1e-2, cbs=cb)

def accumulation(folder):
    "Gradients that wait for their step, trackers, files of other callbacks, a PyTorch optimizer; two fits"
    learn = digits_learner([GradientAccumulation(80), EarlyStoppingCallback(patience=2),
                            SaveTopK('accuracy', k=2, fname='top'), SaveModelCallback(fname='best'),
                            CSVLogger()],
                           n=250, bs=32, path=folder, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    def fits(cb):
        learn.fit(2, 1e-2, cbs=cb)
        learn.fit_one_cycle(2, 1e-2, cbs=cb)
    return learn,fits

class Noise(Transform):
    "Draws from all three generators"
    def encodes(self, x:Tensor): return x + random.random()*np.random.rand()*torch.rand(1) if x.ndim==3 else x

def workers(folder):
    "Two data workers that draw random numbers for each item"
    learn = digits_learner(n=250, bs=32)
    train,valid = learn.dls.train_ds,learn.dls.valid_ds
    learn.dls = DataLoaders(TfmdDL(train, bs=32, shuffle=True, num_workers=2, after_item=Noise()),
                            TfmdDL(valid, bs=32, num_workers=0))
    return learn,lambda cb: learn.fit_one_cycle(2, 1e-2, cbs=cb)

def ranks(folder):
    "Each of two processes with its part of the data, and with random numbers of its own"
    learn = digits_learner(TerminateOnNaN(), n=250, bs=16)
    train,valid = [[ds[i] for i in range(rank_distrib(), len(ds), 2)]
                   for ds in (learn.dls.train_ds, learn.dls.valid_ds)]
    random.seed(rank_distrib())
    learn.dls = DataLoaders(DataLoader(train, bs=16, shuffle=True), DataLoader(valid, bs=16))
    torch.manual_seed(rank_distrib())
    learn.model = DistributedDataParallel(learn.model.to(learn.dls.device))
    return learn,lambda cb: learn.fit_one_cycle(2, 1e-2, cbs=cb)

class Teacher(Callback):
    "A momentum encoder, which a trained temperature brings near"
    def __init__(self): self.t = nn.Parameter(torch.zeros(1))
    def before_fit(self):
        self.slow,self.rng = deepcopy(self.learn.model),torch.Generator().manual_seed(1)
        self.t.data = self.t.data.to(next(self.learn.model.parameters()).device)
    def after_loss(self):
        if not self.training: return
        far = nn.functional.mse_loss(self.pred, self.slow(self.x).detach())
        self.learn.loss_grad = self.loss_grad + far*torch.rand(1, generator=self.rng).item()*self.t.exp()
    def after_step(self):
        for p,q in zip(self.learn.model.parameters(), self.slow.parameters()): q.data.lerp_(p.data, .1)

def teacher(folder):
    """PyTorch's loader with a generator of its own, a callback that owns a model

    Both fits of fine_tune, with graph and table."""
    cb = Teacher()
    learn = digits_learner([cb, ShowGraphCallback(), CSVLogger()], n=250, bs=32, path=folder,
                           splitter=lambda m: [list(m[:6].parameters()), [*m[6:].parameters(), cb.t]])
    train,valid = [[ds[i] for i in range(len(ds))] for ds in (learn.dls.train_ds, learn.dls.valid_ds)]
    order = torch.Generator().manual_seed(5)
    loader = torch.utils.data.DataLoader
    learn.dls = DataLoaders(loader(train, 32, shuffle=True, generator=order), loader(valid, 32),
                            device=default_device())
    return learn,lambda cb: learn.fine_tune(2, 1e-2, cbs=cb)

def logged(folder):
    "All monitors, with a search for a learning rate and a validation between two fits"
    learn = digits_learner([RunLog(folder/'runs', every=1), *monitors(every=3)[1:-1]], n=250, bs=32)
    def fits(cb):
        learn.fit(2, 1e-2, cbs=cb)
        learn.lr_find(num_it=5, show_plot=False)
        learn.validate()
        learn.fit_one_cycle(2, 1e-2, cbs=cb)
    return learn,fits

CASES = {f.__name__: f for f in (tabular, cnn, language, accumulation, workers, teacher, logged, ranks)}

# What must be the same
def flat(o):
    "The values in `o`, as bytes"
    if isinstance(o, Tensor):
        plain = o.detach().cpu().contiguous().flatten()
        yield f'{o.dtype}{tuple(o.shape)}'.encode() + plain.view(torch.uint8).numpy().tobytes()
    elif isinstance(o, dict):
        for k,v in o.items(): yield str(k).encode(); yield from flat(v)
    elif isinstance(o, (list,tuple,L)):
        for v in o: yield from flat(v)
    else: yield repr(o.item() if hasattr(o, 'item') else o).encode()

def digests(learn):
    "A checksum for each part of the result"
    opt,rec = learn.opt,learn.recorder
    def state(p): return dict(opt.state.get(p, {})) if isinstance(opt, Optimizer) else opt.opt.state[p]
    parts = dict(model=dict(learn.model.state_dict()), opt=[state(p) for g in opt.param_lists for p in g],
                 hypers=[dict(h) for h in opt.hypers], losses=rec.losses, lrs=rec.lrs, values=rec.values,
                 iters=rec.iters, hps=getattr(rec, 'hps', None),
                 random=[torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(),
                         [dl.rng.getstate() for dl in learn.dls.loaders if hasattr(dl, 'rng')]])
    if hasattr(learn, 'run_log') and hasattr(learn, 'item_stats'): parts |= tables(learn)
    return {k: hashlib.sha256(b'|'.join(flat(v))).hexdigest()[:12] for k,v in parts.items()}

def tables(learn):
    "What must be in the log once: steps, epochs, layers and activations; and the numbers of the items"
    run = read_log(learn.run_log.log_file.parent)
    kinds = dict(steps=run.steps, epochs=run.epochs, layers=run.of('layers'), acts=run.of('activations'),
                 fits=run.of('fit')[['step','n_epoch']], items=learn.item_stats.table())
    return {k: v.drop(columns='time', errors='ignore').to_csv() for k,v in kinds.items()}

# How it is killed
def kill_self(): os.kill(os.getpid(), signal.SIGKILL)

events = SimpleNamespace(sent=0)      # not in the callback: what is there is put back

class KillAtEvent(Callback):
    "Kills the process at the `n`th event, before or after the other callbacks"
    def __init__(self, n, order): self.n,self.order = n,order
    def __call__(self, event_name):
        events.sent += 1
        if events.sent==self.n: kill_self()

def kill_at_disk_step(n):
    "Kill the process at its `n`th step on the disk: open, write, flush, rename, remove"
    count = itertools.count(1)
    def counted(f, after):
        def g(*args, **kwargs):
            if (k := next(count))==n and not after: kill_self()
            res = f(*args, **kwargs)
            if k==n: kill_self()
            return res
        return g
    for o,name in ((os,'fsync'), (os,'replace'), (Path,'unlink'), (Path,'exists')):
        setattr(o, name, counted(getattr(o, name), n%2))
    import fastai_callbacks_ext.base.files as files
    files._Sink.write = counted(files._Sink.write, n%2)

def plan(r, events, seconds):
    "Where to kill: at an event, at a step on the disk, or whenever"
    kind = r.choice(['event','event','disk','time'])
    return kind,{'event': r.randint(1, events), 'disk': r.randint(1, 150),
                 'time': r.uniform(.02, seconds)}[kind],r.choice([-50, 55, 1999, 3000])

# Runs
def train(case, folder, kill, checkpoints, bar=False):
    "Train `case` to the end; checksums, and the number of events"
    kind,at,order = kill or ('event',0,0)
    learn,fits = CASES[case](folder)
    if kind=='event' and (case!='ranks' or at%2 in (0, rank_distrib())): learn.add_cb(KillAtEvent(at, order))
    if kind=='disk': kill_at_disk_step(at)
    cb = Checkpoint(folder/'run', steps=3, seed_items=case=='workers') if checkpoints else []
    with contextlib.nullcontext() if bar or case=='teacher' else learn.no_bar(): fits(cb)
    return digests(learn),events.sent

def child(case, folder, kill, checkpoints, bar, rank, store):
    "The process id of one that trains, with its output in a file"
    if pid := os.fork(): return pid
    code = 1
    try:
        os.setsid()
        out = os.open(folder/f'out-{rank}.txt', os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        if case=='ranks':
            os.environ |= dict(RANK=str(rank), WORLD_SIZE='2')
            dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
        (folder/f'result-{rank}.json').write_text(json.dumps(train(case, folder, kill, checkpoints, bar)))
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

def attempt(case, folder, kill=None, checkpoints=True, bar=False):
    "Run `case` once; the exit codes of its processes and what they wrote"
    n = 2 if case=='ranks' else 1
    store = tempfile.mktemp()
    pids = [child(case, folder, kill, checkpoints, bar, rank, store) for rank in range(n)]
    if kill and kill[0]=='time':
        time.sleep(kill[1])
        for pid in pids: os.kill(pid, signal.SIGKILL)
    codes = []
    while len(codes)<n:
        pid,status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        for other in pids:     # workers too, and the other rank of one that died
            if other==pid or codes[-1]:
                with contextlib.suppress(ProcessLookupError): os.killpg(other, signal.SIGKILL)
    said = [folder/f'out-{rank}.txt' for rank in range(n)]
    return codes,'\n'.join(f.read_text() for f in said if f.exists())

def results(case, folder):
    "What each process that ended has written"
    n = 2 if case=='ranks' else 1
    return [json.loads((folder/f'result-{rank}.json').read_text()) for rank in range(n)]

def reference(case, folder):
    "Checksums of the run that is not killed, its number of events, and its seconds"
    folder.mkdir(parents=True)
    t = time.time()
    codes,out = attempt(case, folder, checkpoints=case=='workers')    # where items are seeded
    assert not any(codes), out
    res = results(case, folder)
    return dict(digests=[r[0] for r in res], events=res[0][1], seconds=time.time()-t)

def unreadable(folder):
    "Checkpoints with a manifest that cannot be read, and logs with more than a last line that was cut off"
    bad = []
    for f in folder.glob('runs/*.jsonl'):
        for line in f.read_text().split('\n')[:-1]:
            try: json.loads(line)
            except ValueError: bad.append(f'{f}: {line!r}')
    for f in folder.glob('run/*/*.json'):
        try: StateFiles(f.parent)._load(int(f.stem))
        except Exception as e: bad.append(str(e))
    return bad

def trial(case, ref, seed, folder, most=8):
    """Kill a run up to `most` times, then let it end; the kills, and the problems

    Every second run has a progress bar."""
    folder.mkdir(parents=True)
    r,kinds,problems = random.Random(f'{case} {seed}'),[],[]
    while True:
        saved = bool(list(folder.glob('run/*/*.json')))
        kill = plan(r, ref['events'], ref['seconds']) if len(kinds)<most else None
        codes,out = attempt(case, folder, kill, bar=seed%2==0)
        problems += unreadable(folder)
        if -signal.SIGKILL in codes and kill: kinds.append(kill[0])
        elif any(codes): return kinds,[*problems, f'failed: {out[-2000:]}']
        else: break
    if saved and 'resumed' not in out and 'finished' not in out: problems.append(f'did not go on: {out}')
    for got,want in zip(results(case, folder), ref['digests']):
        differ = [k for k in want if got[0][k]!=want[k]]
        if differ: problems.append(f"other bits in {', '.join(differ)}")
    if problems: problems.insert(0, f'{case}, seed {seed}, kills {kinds}')
    else: shutil.rmtree(folder)
    return kinds,problems

def soak(kills, cases, root, first=0, most=8):
    "Kill runs of each of `cases` in turn, so many `kills` in all; the counts of kills, and the problems"
    refs,done,problems = {c: reference(c, root/f'{c}-reference') for c in cases},Counter(),[]
    for seed in itertools.count(first):
        for case in cases:
            kinds,found = trial(case, refs[case], seed, root/f'{case}-{seed}', most)
            done.update((case, k) for k in kinds)
            problems += found
            if sum(done.values())>=kills: return done,problems

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--kills', type=int, default=500, help='kills in all')
    p.add_argument('--most', type=int, default=8, help='kills of one run')
    p.add_argument('--cases', nargs='+', default=list(CASES), choices=CASES)
    p.add_argument('--jobs', type=int, default=2, help='processes that train at a time')
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args(argv)
    import torch._dynamo      # optimizers of PyTorch's and DDP import it: once for all that are forked
    root,start = Path(tempfile.mkdtemp()),time.time()
    torch.set_num_threads(1)
    def job(j):
        res = soak(-(-args.kills//args.jobs), args.cases, root/str(j), args.seed+1000*j, args.most)
        (root/f'{j}.json').write_text(json.dumps([[[*k, n] for k,n in res[0].items()], res[1]]))
    pids = []
    for j in range(args.jobs):
        if not (pid := os.fork()):
            try: job(j)
            except BaseException: traceback.print_exc()
            finally: os._exit(0)
        pids.append(pid)
    for pid in pids: os.waitpid(pid, 0)
    found = [json.loads((root/f'{j}.json').read_text()) for j in range(args.jobs)]
    counts = Counter()
    for rows,_ in found: counts.update({(c,k): n for c,k,n in rows})
    problems = [o for _,ps in found for o in ps]
    kinds = sorted({k for _,k in counts})
    print(f"{'case':14}" + ''.join(f'{k:>8}' for k in kinds) + f"{'kills':>8}")
    for case in args.cases:
        row = [counts[case,k] for k in kinds]
        print(f'{case:14}' + ''.join(f'{n:8}' for n in [*row, sum(row)]))
    well = 'all ended with the same bits, no unreadable state'
    print(f'{sum(counts.values())} kills in {time.time()-start:.0f} s; '
          + (f'{len(problems)} problems' if problems else well))
    for o in problems: print(o)
    if problems: sys.exit(f'left in {root}')
    shutil.rmtree(root)

if __name__=='__main__': main()
