"Which module of the package imports which, and a picture of it: a page of the site, and a test, read it"
import ast
from importlib.util import resolve_name
from pathlib import Path

lib = Path(__file__).resolve().parent.parent/'fastai_callbacks_ext'

def _imported(tree, package):
    "Full names of all that `tree`, a module of `package`, may import from"
    for o in ast.walk(tree):
        if isinstance(o, ast.Import): yield from (a.name for a in o.names)
        if isinstance(o, ast.ImportFrom):
            start = resolve_name('.'*o.level + (o.module or ''), package)
            yield from (start, *(f'{start}.{a.name}' for a in o.names))

def imports():
    "For each module of the package, which others of them it imports: `{'loop': ['base.core'], ...}`"
    name = lambda f: '.'.join([lib.name, *f.relative_to(lib).with_suffix('').parts])
    files = {name(f): f for f in lib.rglob('*.py') if f.name[0]!='_'}
    short = lambda name: name.removeprefix(lib.name+'.')
    found = {k: set(_imported(ast.parse(f.read_text()), k.rpartition('.')[0])) for k,f in files.items()}
    return {short(k): sorted(map(short, found[k] & files.keys())) for k in sorted(files)}

def floors(found):
    "The modules of each floor: those of `base` one above what they import; purposes; what imports purposes"
    res = {}
    def floor(mod):
        if mod not in res: res[mod] = 1+max(map(floor, found[mod]), default=-1)
        return res[mod]
    first = 1+max(map(floor, filter(_is_base, found)))      # the floor of the purposes
    res |= {mod: first for mod in found if not _is_base(mod) and all(map(_is_base, found[mod]))}
    for mod in found: floor(mod)
    return [sorted(mod for mod in found if res[mod]==i) for i in range(max(res.values())+1)]

def _is_base(mod): return mod.startswith('base.')

def direct(found):
    "Without the imports that follow from others"
    def reached(mod): return {o for other in found[mod] for o in (other, *reached(other))}
    return {mod: [o for o in others if not any(o in reached(p) for p in others)]
            for mod,others in found.items()}

def _step(j, n):
    "How much higher box `j` of a floor of `n` is drawn: more than 12 in a row cover each other"
    return .27*(j%3-1) if n>12 else 0

def plot(found=None):
    """Draw the modules as boxes and what each imports as an arrow, but for what follows from others.

    Red is an arrow that does not point down."""
    import matplotlib.pyplot as plt
    found = found or imports()
    rows = floors(found)
    at = {mod: ((j+.5+.1*(i%2))/len(mods), i+_step(j, len(mods)))
          for i,mods in enumerate(rows) for j,mod in enumerate(mods)}
    fig,ax = plt.subplots(figsize=(12, .95*len(rows)))
    for mod,o in [(mod, o) for mod,others in direct(found).items() for o in others]:
        color = '#8a8a8a' if at[o][1]<at[mod][1] else 'red'
        arrow = dict(arrowstyle='-|>', color=color, lw=.7, shrinkA=10, shrinkB=10)
        ax.annotate('', at[o], at[mod], arrowprops=arrow)
    for mod,(x,y) in at.items():
        color = '#dbe9f6' if _is_base(mod) else '#fdebd0'
        box = dict(boxstyle='round,pad=.35', fc=color, ec='#8a8a8a', lw=.7)
        name = mod.removeprefix('base.')
        ax.text(x, y, name, ha='center', va='center', fontsize=8, color='black', bbox=box)
    ax.set(xlim=(0, 1.02), ylim=(-.5, len(rows)-.5))
    ax.axis('off')
    fig.patch.set_alpha(0)      # as dark or as light as the page
    return ax
