"""What is published of each data set: one table, which readers, checks and downloads read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What the publisher states of a data set.

    Attributes:
        title: its full name.
        layout: the files and folders it comes in.
        license: as its publisher states it; None for a user's own images.
        page: the address to get it from, for people; "" for a user's own images.
        login: whether an account is needed there.
        images: the numbers of images that a complete copy can hold, of the parts and of the whole; empty: any.
        size: (width, height) in pixels of every image, or None where they differ.
        nuclei: how many are published, in words.
        citation: whom to cite.
        url: of its archive (zip), where it can be downloaded without asking, or None.
        sha256, bytes: of the archive, or None where they publish none; the size that the server states counts then, and
            the checksums in the archive.
        into: the folder under the root that the archive's content belongs in, or "".
        steps: what a person has to do where there is no `url`; ROOT stands for the folder.
    """

    title: str
    layout: str
    license: str | None = None
    page: str = ""
    login: bool = False
    images: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    nuclei: str = ""
    citation: str = ""
    url: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    into: str = ""
    steps: str = ""


FACTS: dict[str, Facts] = {
    "folder": Facts(
        title="your own images",
        layout="images/ with labels/ (instance maps) or masks/ (binary), paired by name",
    ),
    "nuinsseg": Facts(
        title="NuInsSeg",
        layout="<species organ>/tissue images/*.png and <species organ>/label masks modify/*.tif",
        license="CC BY 4.0",
        page="https://zenodo.org/records/10518968",
        images=(665,),
        size=(512, 512),
        nuclei="30,698",
        citation="Mahbod et al., Scientific Data 2024, doi:10.1038/s41597-024-03117-2",
        url="https://zenodo.org/records/10518968/files/NuInsSeg.zip?download=1",
    ),
    "tnbc": Facts(
        title="TNBC",
        layout="Slide_XX/*.png and GT_XX/*.png",
        license="CC BY 4.0",
        page="https://zenodo.org/records/1175282",
        images=(50,),
        size=(512, 512),
        nuclei="4,022",
        citation="Naylor et al., IEEE Transactions on Medical Imaging 2019, doi:10.1109/TMI.2018.2865709",
        url="https://zenodo.org/records/1175282/files/TNBC_NucleiSegmentation.zip?download=1",
    ),
    "cryonuseg": Facts(
        title="CryoNuSeg",
        layout="tissue images/*.tif and, of each annotator, label masks modify/*.tif",
        license="CC BY-NC-SA 4.0",
        page="https://www.kaggle.com/datasets/ipateam/segmentation-of-nuclei-in-cryosectioned-he-images",
        login=True,
        images=(30,),
        size=(512, 512),
        nuclei="7,596 by annotator 1, 8,044 in the second round, 8,251 by annotator 2",
        citation="Mahbod et al., Computers in Biology and Medicine 2021, doi:10.1016/j.compbiomed.2021.104349",
        steps="log in to Kaggle, download the archive, and unpack it so that ROOT/tissue images/ is there",
    ),
    "dsb_he": Facts(
        title="the color-stained part of the Data Science Bowl 2018",
        layout="images/, labels/ and manifest.csv",
        license="CC0",
        page="https://bbbc.broadinstitute.org/BBBC038",
        images=(107,),
        size=(320, 256),
        citation="Caicedo et al., Nature Methods 2019, doi:10.1038/s41592-019-0612-7",
        steps="get dsb2018, choose its color-stained images of 320 x 256, and lay them and their label maps out as "
        "ROOT/images/, ROOT/labels/ and ROOT/manifest.csv",
    ),
    "monuseg": Facts(
        title="MoNuSeg 2018",
        layout="Tissue Images/*.tif with Annotations/*.xml (train), *.tif beside *.xml (test)",
        license="CC BY-NC-SA 4.0",
        page="https://monuseg.grand-challenge.org/Data/",
        login=True,
        images=(30, 37, 14, 44, 51),
        size=(1000, 1000),
        citation="Kumar et al., IEEE Transactions on Medical Imaging 2017, doi:10.1109/TMI.2017.2677499",
        steps="download the training data through the links on the page, and unpack it so that ROOT/Tissue Images/ and "
        "ROOT/Annotations/ are there",
    ),
    "conic": Facts(
        title="CoNIC 2022",
        layout="images.npy, labels.npy, counts.csv and patch_info.csv",
        license="CC BY-NC-SA 4.0",
        page="https://conic-challenge.grand-challenge.org/Data/",
        login=True,
        images=(4981,),
        size=(256, 256),
        citation="Graham et al., Medical Image Analysis 2024, doi:10.1016/j.media.2023.103047",
        steps="log in to grand-challenge, join the challenge, download the training data, and put images.npy, "
        "labels.npy, counts.csv and patch_info.csv into ROOT",
    ),
    "dsb2018": Facts(
        title="the Data Science Bowl 2018 (BBBC038), training images of stage 1",
        layout="stage1_train/<id>/images/<id>.png and stage1_train/<id>/masks/*.png",
        license="CC0",
        page="https://bbbc.broadinstitute.org/BBBC038",
        images=(670,),
        citation="Caicedo et al., Nature Methods 2019, doi:10.1038/s41592-019-0612-7",
        url="https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip",
        into="stage1_train",
    ),
    "pannuke": Facts(
        title="PanNuke",
        layout="Fold N/images/foldN/{images,types}.npy and Fold N/masks/foldN/masks.npy",
        license="CC BY-NC-SA 4.0",
        page="https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke",
        images=(2656, 2523, 2722, 2656 + 2523, 2656 + 2722, 2523 + 2722, 7901),
        size=(256, 256),
        citation="Gamper et al., arXiv:2003.10778",
        steps="download the three folds from the page, and unpack them so that ROOT/Fold 1/images/fold1/images.npy and "
        "so on are there",
    ),
    "lizard": Facts(
        title="Lizard",
        layout="lizard_images1/Lizard_Images1/*.png, lizard_images2/Lizard_Images2/*.png and "
        "lizard_labels/Lizard_Labels/ with Labels/*.mat and info.csv",
        license="non-commercial",
        page="https://warwick.ac.uk/fac/cross_fac/tia/data/lizard",
        images=(238,),
        nuclei="about 495,000, test images that are not public included",
        citation="Graham et al., ICCV Workshops 2021, arXiv:2108.11195",
        steps="download images and labels from the page, and unpack them so that ROOT/lizard_images1/, "
        "ROOT/lizard_images2/ and ROOT/lizard_labels/ are there",
    ),
    "qupath": Facts(
        title="your own annotations",
        layout="images with a .geojson of the same name beside each",
    ),
}

PUBLISHED = tuple(name for name, facts in FACTS.items() if facts.page)
