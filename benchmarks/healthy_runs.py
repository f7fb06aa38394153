"A dozen healthy runs of different kinds under `SpikeGuard()` as it comes: how often does it act?"
import argparse, contextlib, io, json, random, warnings
from functools import partial
from pathlib import Path
warnings.filterwarnings('ignore')

import numpy as np, torch, torch.nn.functional as F
from fastai.basics import *
from fastai.callback.all import *
from torch import nn
from torch.utils.data import DataLoader as TorchLoader
from fastai_callbacks_ext.all import SpikeGuard
from fastai_callbacks_ext.test_utils import digits_dls, digits_learner, digits_model, text_learner

def learner(x, y, bs, model, loss, opt_func=Adam, **kwargs):
    "A learner for tensors; a tenth of them for validation"
    n = len(x)//10
    dls = DataLoaders(TorchLoader(list(zip(x[n:], y[n:])), bs, shuffle=True),
                      TorchLoader(list(zip(x[:n], y[:n])), 64))
    return Learner(dls, model, loss_func=loss, opt_func=opt_func, **kwargs)

def adding(cbs):
    "An RNN that has to add two marked numbers among 30: a long plateau, then it finds out"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn,self.out = nn.GRU(2, 32, batch_first=True),nn.Linear(32, 1)
        def forward(self, x): return self.out(self.rnn(x)[0][:,-1])[:,0]
    x = torch.rand(3000, 30, 2)
    marks = torch.rand(3000, 30).topk(2).indices
    x[...,1] = torch.zeros(3000, 30).scatter(1, marks, 1.)
    learner(x, (x[...,0]*x[...,1]).sum(1), 32, Net(), nn.MSELoss(), cbs=cbs).fit(6, 5e-3)

def parity(cbs):
    "A network that has to find the parity of 3 of 20 bits: a plateau, then a sharp descent"
    x = torch.randint(0, 2, (4000,20)).float()*2-1
    net = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 2))
    learner(x, (x[:,:3].prod(1)>0).long(), 32, net, nn.CrossEntropyLoss(), SGD, cbs=cbs).fit(8, 0.1)

def seed(): return random.randrange(10**6)

def one_cycle(cbs): digits_learner(cbs, seed=seed(), n=1797, bs=16).fit_one_cycle(5, 2e-2)
def mlp(n): return nn.Sequential(nn.Flatten(), nn.Linear(64,n), nn.ReLU(), nn.Linear(n,10))
def tiny_batches(cbs):
    digits_learner(cbs, seed=seed(), n=700, bs=2, opt_func=RMSProp, lr=1e-3, model=mlp(32)).fit(2)
def to_the_end(cbs): digits_learner(cbs, seed=seed(), n=500, bs=16, model=mlp(128)).fit(25, 1e-2)
def language(cbs):
    learn = text_learner(bs=8, n=9_000, opt_func=SGD, seed=seed())
    learn.add_cbs(cbs)
    learn.fit_one_cycle(3, 5, moms=None)

def fine_tuning(cbs):
    "Trained on five digits, then tuned on all of them"
    learn = digits_learner(seed=seed(), n=800, bs=16,
                           splitter=lambda m: [list(m[:6].parameters()), list(m[6:].parameters())])
    learn.fit_one_cycle(2, 1e-2)
    learn.model[-1].reset_parameters()
    learn.add_cbs(cbs)
    learn.fine_tune(4, 1e-2)

def contrastive(cbs):
    "Two noisy views of each digit, and InfoNCE"
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64,64), nn.ReLU(), nn.Linear(64,32))
        def forward(self, x):
            views = [x+.3*torch.randn_like(x) for _ in range(2)]
            return torch.stack([F.normalize(self.net(v), dim=1) for v in views])
    def nce(z, y): return F.cross_entropy(z[0]@z[1].T/.1, torch.arange(len(y), device=y.device))
    learn = digits_learner(cbs, seed=seed(), n=1500, bs=32, model=Views(), loss_func=nce, metrics=[])
    learn.fit_one_cycle(5, 5e-3)

def triplets(cbs):
    "A margin loss of which most batches are soon exactly 0"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
        def forward(self, x): return self.net(x)
    centers = torch.randn(10, 8)*3
    y = torch.randint(0, 10, (3,4000))
    y[1] = y[0]
    x = centers[y]+torch.randn(3, 4000, 8)*.7
    def margin(z, y):
        a,p,n = z.unbind(1)
        return F.relu(.5+(a-p).pow(2).sum(1)-(a-n).pow(2).sum(1)).mean()
    learner(x.transpose(0,1), y[0], 4, Net(), margin, cbs=cbs).fit(2, 1e-3)

def hinge(cbs):
    "A linear model on data that can be told apart, but for a few"
    x = torch.randn(4000, 10)
    y = torch.sign(x[:,0]+.5*x[:,1])
    wrong = torch.rand(4000)<.02
    x[:,0] += y*2
    y[wrong] *= -1
    learner(x, y, 4, nn.Linear(10, 1), lambda o,t: F.relu(1-o[:,0]*t).mean(), SGD, cbs=cbs).fit(2, 3e-2)

def adversarial(cbs):
    "A generator and a critic in one step: the loss goes up and down, and is sometimes negative"
    class Gan(nn.Module):
        def __init__(self):
            super().__init__()
            def net(i, o): return nn.Sequential(nn.Linear(i,32), nn.LeakyReLU(.2), nn.Linear(32,o))
            self.g,self.d = net(4,2),net(2,1)
        def forward(self, x):
            fake = self.g(torch.randn(len(x), 4, device=x.device))
            return self.d(x),self.d(fake.detach()),_frozen(self.d, fake)
    def _frozen(net, x):
        for p in net.parameters(): p.requires_grad_(False)
        out = net(x)
        for p in net.parameters(): p.requires_grad_(True)
        return out
    def loss(o, y):
        real,fake,again = o
        return F.softplus(-real).mean()+F.softplus(fake).mean()-again.mean()
    t = torch.rand(6000)*6.3
    x = torch.stack([t.cos(), t.sin()], 1)+.05*torch.randn(6000,2)
    learner(x, t, 32, Gan(), loss, partial(Adam, mom=.5), cbs=cbs).fit(5, 1e-3)

def heavy_tails(cbs):
    "Regression whose errors are Cauchy's, with a loss that does not tame them much"
    x = torch.randn(6000, 8)
    y = x@torch.randn(8)+torch.distributions.StudentT(1.5).sample((6000,))
    net = nn.Sequential(nn.Linear(8,16), nn.ReLU(), nn.Linear(16,1))
    def loss(o, t): return (o[:,0]-t).abs().pow(1.5).mean()
    learner(x, y, 8, net, loss, cbs=cbs).fit(2, 1e-3)

def regression(cbs):
    "From far away: targets of 1,000, and a loss that falls by a factor of a million"
    x = torch.randn(4000, 8)
    def loss(o, t): return F.mse_loss(o[:,0], t)
    learner(x, 1000+x@torch.randn(8), 16, nn.Linear(8,1), loss, SGD, cbs=cbs).fit(3, 1e-2)

RUNS = {'an RNN leaves a plateau': adding, 'parity: plateau, then sharp descent': parity,
        'one-cycle at a high learning rate': one_cycle, 'language model, SGD at 5': language,
        'fine-tuning': fine_tuning, 'batches of two, RMSProp': tiny_batches,
        'training until nothing is left': to_the_end, 'contrastive (InfoNCE)': contrastive,
        'triplets, mostly 0': triplets, 'hinge loss, wrong labels': hinge,
        'generator and critic': adversarial, 'heavy-tailed errors': heavy_tails,
        'loss falls by a million': regression}

class Count(Callback):
    "Counts training batches"
    order,run_valid = 2000,False
    def __init__(self): self.batches = 0
    def after_batch(self): self.batches += 1

def run(f, seed, cbs):
    "A run of `f`, with nothing printed and no bar"
    set_seed(seed)
    class Quiet(Callback):
        def after_create(self):
            self.learn.remove_cbs([cb for cb in self.learn.cbs if isinstance(cb, ProgressCallback)])
            self.learn.logger = noop
    with contextlib.redirect_stdout(io.StringIO()): f([Quiet(), *cbs])

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results'/'healthy_runs.json')
    args = p.parse_args()
    found = {}
    for name,f in RUNS.items():
        guards,counts = [],[]
        for s in range(args.seeds):
            guards.append(SpikeGuard())
            counts.append(Count())
            run(f, s, [guards[-1], counts[-1]])
        found[name] = dict(batches=[c.batches for c in counts], acted=[len(g.records) for g in guards])
        print(f'{name:40} {found[name]}', flush=True)
        for g in guards: print(*[f'    {r}' for r in g.records[:3]], sep='\n', end='')
    args.out.write_text(json.dumps(found, indent=1)+'\n')

if __name__=='__main__': main()
