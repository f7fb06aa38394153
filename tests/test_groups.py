"`layer_groups` and `HyperMult`: the order of the layers, and the rate and decay of each weight in each step"
import copy, pickle, subprocess, sys
from functools import partial

import numpy as np
import pytest, torch
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam, Lamb, OptimWrapper, RAdam, ranger
from fastai.tabular.model import TabularModel
from fastai.text.all import AWD_LSTM, get_language_model, get_text_classifier
from fastai.vision.all import create_body, create_head
from torch import nn
from torchvision import models
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.identity import describe_callback
from fastai_callbacks_ext.base.model import plain_name
from fastai_callbacks_ext.freeze import Freeze
from fastai_callbacks_ext.groups import HyperMult, layer_groups
from fastai.torch_core import to_cpu
from test_import import missing
from test_safety import AnyMixedPrecision
from common import fit, learner

# --- layers -----------------------------------------------------------------------------------------
def begins(model, groups=None):
    "Name of the first parameter of each group"
    names = {id(p): n for n,p in model.named_parameters()}
    return [names[id(o[0])].rpartition('.')[0] or names[id(o[0])] for o in (groups or layer_groups())(model)]

def vit(): return models.VisionTransformer(32, 8, 3, 2, 16, 32)
def image_model(arch): return nn.Sequential(create_body(arch()), create_head(512, 10))
def stages(*n): return [f'{i}.{j}' for i,k in enumerate(n, 1) for j in range(k)]

class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.words,self.places,self.norm = nn.Embedding(9, 4),nn.Embedding(9, 4),nn.LayerNorm(4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2))
        self.pooler = nn.Linear(4, 4)

MODELS = dict(
    pooled=(lambda: nn.Sequential(Bert(), nn.Dropout(), nn.Linear(4, 2)),
            ['0.words', *(f'0.layers.{i}.self_attn' for i in range(2)), '2']),
    headless=(Bert, ['words', *(f'layers.{i}.self_attn' for i in range(2)), 'pooler']),
    resnet=(models.resnet18, ['conv1', *(f'layer{o}.conv1' for o in stages(2,2,2,2)), 'fc']),
    vit=(vit, ['class_token', *(f'encoder.layers.encoder_layer_{i}.ln_1' for i in range(3)), 'heads.head']),
    fastais=(lambda: image_model(models.resnet18),
             ['0.0', *(f'0.{i}.{j}.conv1' for i in range(4,8) for j in range(2)), '1.2']),
    vgg=(lambda: image_model(models.vgg11_bn), [*(f'0.0.{i}' for i in (0,4,8,11,15,18,22,25)), '1.2']),
    language=(lambda: get_language_model(AWD_LSTM, 50),
              ['0.encoder', *(f'0.rnns.{i}' for i in range(3)), '1.decoder']),
    text=(lambda: get_text_classifier(AWD_LSTM, 50, 3),
          ['0.module.encoder', *(f'0.module.rnns.{i}' for i in range(3)), '1.layers.0.0']),
    table=(lambda: TabularModel([(3,2), (4,2)], 2, 1, [9,9]),
           ['embeds.0', 'layers.0.0', 'layers.1.0', 'layers.2.0']),
    parallel=(partial(models.googlenet, init_weights=False),
              ['conv1.conv', *(f'inception{o}.branch1.conv' for o in
                                                 ('3a','3b','4a','4b','4c','4d','4e','5a','5b'))]),
    one=(lambda: nn.Linear(3, 2), ['weight']))

@pytest.mark.parametrize('name', MODELS)
def test_layers(name):
    make,expected = MODELS[name]
    found = begins(make())
    assert (found[:10] if name=='parallel' else found)==expected        # then its helpers' heads

ARCHS = 'efficientnet_b0','convnext_tiny','swin_t','densenet121','mobilenet_v3_small','resnet50'
@pytest.mark.parametrize('make', [*(getattr(models, o) for o in ARCHS), *(m for m,_ in MODELS.values())])
@pytest.mark.parametrize('split_wd', [False, True])
def test_each_parameter_is_in_one_group_in_the_order_of_the_model(make, split_wd):
    with torch.device('meta'): model = make()
    model.requires_grad_(False)     # frozen ones too
    groups = layer_groups(split_wd=split_wd)
    ids,got = [id(p) for p in model.parameters()],[id(p) for g in groups(model) for p in g]
    assert sorted(ids)==sorted(got) and all(groups(model))
    rates = [*dict.fromkeys(groups.multipliers(model)['lr'].values())]
    assert max(rates)==1. and len(rates)<=len(groups(model))
    assert groups.table(model).count('\n')==len(groups(model))

def test_frozen_is_all_but_the_head():
    learn = learner(splitter=layer_groups(), train_bn=False)
    learn.freeze()
    assert [n for n,p in learn.model.named_parameters() if p.requires_grad]==['8.weight','8.bias']
    learn.freeze_to(-2)
    assert not learn.model[0].weight.requires_grad and learn.model[3].weight.requires_grad

def test_with_groups_for_the_decay_the_head_is_the_last_two():
    learn = learner(splitter=layer_groups(split_wd=True), train_bn=False)
    learn.freeze_to(-2)
    assert [n for n,p in learn.model.named_parameters() if p.requires_grad]==['8.weight','8.bias']
    assert [len(g) for g in learn.opt.param_lists]==[3,1,3,1,1,1]

def test_the_rates_of_a_slice_rise_by_layer():
    learn = learner(splitter=layer_groups())
    fit(learn, 1, lr=slice(1e-4, 1e-2))
    assert np.allclose([h['lr'] for h in learn.opt.hypers], [1e-4,1e-3,1e-2])

class RMSNorm(nn.Module):
    def __init__(self): super().__init__(); self.g = nn.Parameter(torch.ones(2, 2))

class Special(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed,self.cls_token = (nn.Parameter(torch.zeros(1, 2, 4)) for _ in range(2))
        self.a,self.b,self.c,self.d = nn.GroupNorm(2, 4),RMSNorm(),nn.MultiheadAttention(4, 2),nn.LSTM(4, 4)
        self.e = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

def test_which_weights_have_no_decay():
    wd = layer_groups().multipliers(Special())['wd']
    kept = {n for n,m in wd.items() if m}
    assert kept=={'c.in_proj_weight','c.out_proj.weight','d.weight_ih_l0','d.weight_hh_l0',
                  'e.parametrizations.weight.original0','e.parametrizations.weight.original1'}
    only = layer_groups(no_wd=('norm','d.*')).multipliers(Special())['wd']
    assert {n for n,m in only.items() if not m}=={'a.weight','a.bias','b.g', *(n for n in wd if n[0]=='d')}

def test_as_timm_groups_its_models():
    timm = pytest.importorskip('timm')
    from timm.optim import param_groups_layer_decay
    for arch in ('vit_tiny_patch16_224','resnet18','convnext_atto'):
        model = timm.create_model(arch)
        ids,no = {id(p): n for n,p in model.named_parameters()},getattr(model, 'no_weight_decay', tuple)()
        theirs = param_groups_layer_decay(model, .05, no_weight_decay_list=no, layer_decay=.7)
        theirs = {ids[id(p)]: (g['lr_scale'], g['weight_decay']>0) for g in theirs for p in g['params']}
        ours = layer_groups(decay=.7).multipliers(model)
        assert theirs=={n: (pytest.approx(ours['lr'][n]), ours['wd'][n]>0) for n in theirs}

# --- multipliers ------------------------------------------------------------------------------------
class Hypers(Callback):
    "Rate and decay of each group in each step"
    order,run_valid = 3000,False
    def before_fit(self): self.lr,self.wd = [],[]
    def before_step(self):
        for k in ('lr','wd'): getattr(self, k).append([h[k] for h in self.opt.hypers])

OPTS = dict(fastai=Adam, radam=RAdam, wrapper=partial(OptimWrapper, opt=torch.optim.AdamW))
BESIDE = dict(alone=list, loop=lambda: [FastLoop()], acc=lambda: [GradientAccumulation(64)],
              sam=lambda: [SAM()],
              scaler=lambda: [AnyMixedPrecision(torch.float32, 2.**10)], ema=lambda: [EMA()])

def hypers(*cbs, method='fit_one_cycle', n=3, splitter=layer_groups(split_wd=True), beside='alone', **kwargs):
    learn = learner(cbs=[*cbs, *BESIDE[beside](), seen := Hypers()], splitter=splitter, wd=.1, **kwargs)
    fit(learn, n, method)
    return np.array(seen.lr),np.array(seen.wd),learn

@pytest.mark.parametrize('beside', BESIDE)
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('method', ['fit','fit_one_cycle','fit_flat_cos','fine_tune'])
def test_each_rate_is_that_of_the_schedule_times_its_multiplier(method, opt, beside):
    groups = layer_groups(decay=.5, split_wd=True)
    how = dict(method=method, beside=beside, opt_func=OPTS[opt])
    lr,wd,learn = hypers(HyperMult(groups), **how)
    lr0,wd0,plain = hypers(**how)
    assert np.allclose(lr, lr0*[.25,.25,.5,.5,1,1], rtol=1e-12) and np.allclose(wd, wd0*([0,1]*3))
    assert [h for h in learn.opt.hypers]==[h for h in plain.opt.hypers]

@pytest.mark.parametrize('given,expected', [
    (dict(lr={'0': .1, '1': .1}), [.1,1,1]), (dict(lr={'[01].*': .1, '3': .5, '4': .5}), [.1,.5,1]),
    (dict(lr=lambda n: .3 if n[0] in '01' else 2.), [.3,2.,2.]), (dict(lr={'*': .5, '8': .5}), [.5,.5,.25]),
    (dict(lr=layer_groups(decay=.1)), [.01,.1,1])])
def test_by_name_and_by_function(given, expected):
    how = dict(splitter=layer_groups())
    lr,_,_ = hypers(HyperMult(**given), **how)
    assert np.allclose(lr, hypers(**how)[0]*expected, rtol=1e-12)

def test_two_multiply_with_a_plateau():
    cbs = [HyperMult(lr={'*': .5}), HyperMult(wd={'*': .5}), ReduceLROnPlateau(min_delta=9, factor=4)]
    lr,wd,_ = hypers(*cbs)
    lr0,wd0,_ = hypers()
    assert np.allclose(lr, lr0*np.repeat([.5,.5,.125], 4)[:,None]) and np.allclose(wd, wd0/2)

class NoGradient(Callback):
    "All gradients are zero"
    order = 2000
    def after_backward(self):
        for p in self.model.parameters(): p.grad.zero_()

WD = [dict(lr=layer_groups()), dict(wd={'norm':0, 'bias':0})]
@pytest.mark.parametrize('opt,kwargs,splitter', [
    *((o, k, s) for o in (Adam, RAdam, Lamb, partial(Adam, decouple_wd=False), partial(SGD, mom=.9), ranger)
      for k in WD for s in (layer_groups(), layer_groups(split_wd=True))),
    *((partial(OptimWrapper, opt=o), dict(lr=layer_groups()), layer_groups(split_wd=True))
      for o in (torch.optim.AdamW, torch.optim.SGD)),
    (Adam, dict(wd={'norm':0, 'bias':0}), lambda m: [list(m.parameters())])])
def test_weights_without_decay_do_not_move_at_zero_gradient(opt, kwargs, splitter):
    "And the others do"
    learn = learner(cbs=[HyperMult(**kwargs), NoGradient()], splitter=splitter, wd=.1, wd_bn_bias=True,
                    opt_func=opt)
    with torch.no_grad():
        for p in learn.model.parameters(): p += .1      # no bias of 0, which decay would leave as it is
    before = {n: p.detach().clone() for n,p in learn.model.named_parameters()}
    fit(learn, 2)
    moved = {n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved=={'0.weight','3.weight','8.weight'}

def test_marks_of_the_optimizer_are_put_back():
    "However the fit ends"
    class Fails(Callback):
        def after_batch(self):
            if self.train_iter==2: raise KeyboardInterrupt
    learn = learner(cbs=HyperMult(wd={'norm':0}), wd=.1)
    learn.create_opt()
    marks = lambda: [(learn.opt.state[p].get('do_wd'), learn.opt.state[p].get('force_train'))
                     for p in learn.model.parameters()]
    del learn.opt.state[learn.model[1].weight]['do_wd']
    before = marks()
    fit(learn, 1)
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Fails())
    assert marks()==before and {h['wd'] for h in learn.opt.hypers}=={.1}

@pytest.mark.parametrize('opt', ['fastai','wrapper'])
@pytest.mark.parametrize('method', ['fit','fit_one_cycle'])
def test_a_resumed_run_is_the_same(tmp_path, method, opt):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.epoch==1 and self.iter==1: raise KeyboardInterrupt
    def run(*cbs):
        groups = layer_groups(split_wd=opt=='wrapper')
        cbs = [HyperMult(groups), Freeze({0:-1, 1:0}), *cbs]
        how = dict(splitter=groups, wd=.1, wd_bn_bias=True, opt_func=OPTS[opt])
        return fit(learner(cbs=cbs, **how), 3, method)
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    resumed = run(Checkpoint(tmp_path, steps=1))
    assert resumed.recorder.lrs==whole.recorder.lrs
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))

def test_other_multipliers_are_another_run():
    words = {describe_callback(HyperMult(o)) for o in (
        layer_groups(), layer_groups(), layer_groups(.5), layer_groups(no_wd='norm'), {'*': .5}, {'*': .2})}
    assert len(words)==5

def test_nothing_outside_of_a_fit(capsys):
    learn = learner(cbs=HyperMult(lr={'*': .1}), lr=1e-2)
    with learn.no_bar(), learn.no_logging():
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=6, show_plot=False)
    assert 'hyper_mult' not in capsys.readouterr().out
    fit(learn, 1)
    assert 'hyper_mult: multiplies lr by 0.1 in epoch 0' in capsys.readouterr().out

def test_copies_and_exports(tmp_path):
    groups = layer_groups()
    learn = learner(cbs=HyperMult(groups), splitter=groups)
    fit(copy.deepcopy(learn), 1), fit(pickle.loads(pickle.dumps(learn)), 1)
    fit(learn, 1)
    learn.export(tmp_path/'end.pkl')
    loaded = load_learner(tmp_path/'end.pkl')
    assert isinstance(loaded.hyper_mult, HyperMult)
    assert vars(loaded.splitter)==vars(groups)==vars(copy.copy(groups))

def test_an_export_loads_without_the_package(tmp_path):
    groups = layer_groups()
    learn = fit(learner(cbs=HyperMult(groups), splitter=groups, path=tmp_path), 1)
    batch = to_cpu(learn.dls.valid.one_batch())
    learn.dls.cpu()
    with learn.no_bar(): want = learn.get_preds(dl=[batch])[0]
    torch.save((*batch, want), tmp_path/'want.pt')
    learn.export()
    res = subprocess.run([sys.executable, '-c', missing, tmp_path], capture_output=True, text=True)
    assert res.returncode==0, res.stderr[-2000:]

def test_in_a_wrapper_and_compiled():
    model = vit()
    wrapped = nn.DataParallel(model)
    assert layer_groups().multipliers(wrapped)==layer_groups().multipliers(model)
    model.encoder = torch.compile(model.encoder)
    assert {plain_name(n) for n,_ in model.named_parameters()}==layer_groups().multipliers(model)['lr'].keys()

@pytest.mark.parametrize('make,message', [
    (lambda: HyperMult(), 'expected lr or wd'), 
    (lambda: HyperMult(lr={}), 'expected a multiplier for some names'),
    (lambda: HyperMult(lr={'0': -1}), "lr['0']=-1: expected a finite number >= 0"),
    (lambda: HyperMult(lr=.1), 'lr=0.1: expected dict'), 
    (lambda: HyperMult(wd=layer_groups()), 'HyperMult(groups)'),
    (lambda: HyperMult(layer_groups(), {'bias':0}), 'can be in a second HyperMult'),
    (lambda: layer_groups(decay=0), 'expected more than 0'), (lambda: layer_groups(decay='a'), "decay='a'"),
    (lambda: layer_groups(no_wd=3), 'no_wd=3'), (lambda: layer_groups(split_wd=1), 'split_wd=1')])
def test_refused_when_it_is_made(make, message):
    with pytest.raises((ValueError, TypeError)) as e: make()
    assert message in str(e.value)

@pytest.mark.parametrize('cb,opt,message', [
    (lambda: HyperMult(lr={'0': .1}), 'fastai',
     'lr of group 0 (of 1) would be multiplied by 0.1 for 0.weight, 0.bias; 1 for 1.weight, 1.bias, '
     '3.weight and 5 more'),
    (lambda: HyperMult(layer_groups()), 'fastai', 'Learner(splitter=), such as layer_groups()'),
    (lambda: HyperMult(wd={'bias': .5}), 'fastai', 'wd of group 0'),
    (lambda: HyperMult(wd={'bias': 0}), 'wrapper', 'with OptimWrapper, layer_groups(split_wd=True)'),
    (lambda: HyperMult(lr={'haed': .1}), 'fastai', "lr='haed': no parameter"),
    (lambda: HyperMult(lr=lambda n: -1), 'fastai', "lr('0.weight')=-1"),
    (lambda: HyperMult(layer_groups(no_wd='nomr')), 'fastai', "no_wd='nomr': no parameter")])
def test_refused_at_the_start_of_a_fit(cb, opt, message):
    with pytest.raises((ValueError, TypeError)) as e: fit(learner(cbs=cb(), opt_func=OPTS[opt]), 1)
    assert message in str(e.value)
