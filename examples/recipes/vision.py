"""Fine-tune an image classifier with all that a long run needs, put together

    python examples/recipes/vision.py --path runs/vision
    python examples/recipes/vision.py --data my/images --size 224

`my/images` has a folder for each class, as `untar_data(URLs.MNIST)/'training'` has."""
from fastai.vision.all import *
from fastai_callbacks_ext.all import *
from sklearn.datasets import load_digits

# small and untrained; on a GPU: resnet34,True, which downloads pretrained weights
ARCH,WEIGHTS = partial(xresnet18, widen=0.25),False

def digits(folder):
    "Some of scikit-learn's digits as files, in a folder for each class"
    data = load_digits()
    for i,(x,y) in enumerate(zip(data.images[:400], data.target)):
        (folder/str(y)).mkdir(exist_ok=True)
        Image.fromarray((x*15).astype('uint8')).save(folder/str(y)/f'{i:03}.png')
    return folder

@call_parse
def main(
    path:Path='runs/vision', # Folder for the checkpoints and models of this run
    data:Path=None, # Folder of images; without it, digits
    size:int=32, # Height and width of the images
    epochs:int=3, # After one epoch with a frozen body
):
    set_seed(42)
    dls = ImageDataLoaders.from_folder(data or digits(Path(tempfile.mkdtemp())),
        item_tfms=Resize(size), batch_tfms=aug_transforms(do_flip=False), bs=32,
        valid_pct=0.2, seed=42)
    learn = vision_learner(dls, ARCH, path=path, pretrained=WEIGHTS, metrics=accuracy)
    learn.fine_tune(epochs, 1e-2, cbs=[
        Checkpoint(path/'checkpoints', minutes=10, seed_items=True), PreemptionGuard(),
        SpikeGuard(), GradientClip(1.),     # NaN is a spike too: no `SkipNonFinite`
        EMA(), SaveTopK('accuracy', k=2),   # the average is validated and saved
        FastLoop()])
    learn.export('model.pkl')               # the best one
