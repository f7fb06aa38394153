"""Time of an optimizer's step by fastai, by FusedStep's kernels, and by PyTorch's AdamW

With the parameters of ResNet-50, ViT-B/16 and a tiny network, and random gradients. Each table is one
optimizer on one model: its cases are measured in turn. On a CPU in time of the processor, which other
programs lengthen less. On a GPU a case takes 10 steps, and then waits for them.
"""
import warnings
from functools import partial
from time import perf_counter, process_time
warnings.filterwarnings('ignore')

import torch
from fastai.optimizer import SGD, Adam, Lamb, Larc, QHAdam, RAdam, RMSProp, ranger
from fastai_callbacks_ext.base.kernels import lend_kernels
from harness import measure, options, ratio, report
from torch import nn

def resnet50():
    "Shapes of its 161 parameters"
    def conv(i, o, k): return [(o, i, k, k), (o,), (o,)]      # with its batch norm
    res,i = conv(3, 64, 7),64
    for n,width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(n):
            res += conv(i, width, 1)+conv(width, width, 3)+conv(width, 4*width, 1)
            if not block: res += conv(i, 4*width, 1)
            i = 4*width
    return [*res, (1000, 2048), (1000,)]

def vit_b_16(d=768):
    "Shapes of its 152 parameters"
    def linear(i, o): return [(o, i), (o,)]
    norm = [(d,), (d,)]
    block = norm+linear(d, 3*d)+linear(d, d)+norm+linear(d, 4*d)+linear(4*d, d)
    return [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d), *block*12, *norm, *linear(d, 1000)]

def digits():
    "Shapes of the 10 parameters of `digits_model`"
    return [(16, 1, 3, 3), *[(16,)]*3, (32, 16, 3, 3), *[(32,)]*3, (10, 128), (10,)]

MODELS = {'ResNet-50': resnet50, 'ViT-B/16': vit_b_16, 'Digits CNN of 6,000 parameters': digits}
OPTIMIZERS = dict(SGD=partial(SGD, mom=.9, wd=.01), RMSProp=RMSProp, Adam=Adam, RAdam=RAdam, QHAdam=QHAdam,
                  Larc=Larc, Lamb=Lamb, ranger=ranger)

AUTO = "kernel='auto'"
KERNELS = {'fastai': None, "kernel='foreach'": 'foreach', "kernel='fused'": 'fused', AUTO: 'auto'}

TORCHS = {False: "torch's AdamW(foreach=True)", True: "torch's AdamW(fused=True)"}

def params_of(model, device):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(o, device=device)*.05) for o in MODELS[model]()]
    for p in params: p.grad = torch.randn_like(p)*.01
    return params

def fastais(make, params, kernel=None):
    "An optimizer of fastai that has made 100 steps, weight decay off for norms and biases"
    opt = make(params, lr=1e-6)
    for p in params:
        if p.ndim==1: opt.state[p]['do_wd'] = False
    if kernel: lend_kernels(opt, kernel)
    opt.step()
    for p in params:
        if 'step' in opt.state[p]: opt.state[p]['step'] = 100
    return opt

def torchs(params, **kwargs):
    groups = [dict(params=[p for p in params if p.ndim>1]),
              dict(params=[p for p in params if p.ndim==1], weight_decay=0.)]
    return torch.optim.AdamW(groups, lr=1e-6, **kwargs)

def seconds(f, device):
    "Seconds a call"
    if device=='cpu':
        time,n = process_time,0
        start,end = time(),time()
        while end-start<.01:
            f()
            n,end = n+1,time()
        return (end-start)/n
    torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(10): f()
    torch.cuda.synchronize()
    return (perf_counter()-start)/10

def table(model, name, device, rounds):
    params,make = params_of(model, device),OPTIMIZERS[name]
    cases = {k: fastais(make, params, kernel) for k,kernel in KERNELS.items()}
    if name=='Adam':
        cases |= {TORCHS[fused]: torchs(params, fused=fused, foreach=not fused) for fused in (False, True)}
    return measure({k: partial(seconds, opt.step, device) for k,opt in cases.items()}, rounds, 'ms a step')

def zeros(model, device, rounds):
    params = params_of(model, device)
    cases = {k: fastais(SGD, params, KERNELS[k]).zero_grad for k in ('fastai',AUTO)}
    return measure({k: partial(seconds, f, device) for k,f in cases.items()}, rounds, 'ms a step')

def results_of(device, rounds, models=MODELS, optimizers=OPTIMIZERS):
    tables = {f'{m}, zero_grad': zeros(m, device, rounds) for m in models}
    return {f'{m}, {o}': table(m, o, device, rounds) for m in models for o in optimizers}|tables

def summary(results):
    "The ratios that count"
    for title,t in results['tables'].items():
        over = lambda row,base=None: f'{ratio(results, title, row, base):.2f}'
        ours = ', '.join(f'{k} {over(k)}' for k in t['rows'] if k.startswith('kernel'))
        print(f'{title}: {ours} over fastai')
        if (peer := TORCHS[True]) in t['rows']: print(f"    kernel='auto' {over(AUTO, peer)} over {peer}")

def main():
    parser = options(__doc__, rounds=7)
    parser.add_argument('--device', choices=('cpu','cuda'), default='cpu')
    args = parser.parse_args()
    name = 'optimizers' if args.device=='cpu' else 'optimizers_cuda'
    summary(report(name, results_of(args.device, args.rounds), args.rounds, args.device))

if __name__=='__main__': main()
