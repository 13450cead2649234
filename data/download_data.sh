#!/usr/bin/env bash
# Fetch data sets by name, check them and put them where the readers look. See --help.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: bash data/download_data.sh [--dir DIR] [--keep] [--again] SET [SET ...]
       bash data/download_data.sh --list
       bash data/download_data.sh [--dir DIR] --archive FILE [--archive FILE ...]

SET is one or more of: shapenet shapenet_render modelnet40 scanobjectnn shapenetpart s3dis all
Pretraining needs shapenet and shapenet_render.

  --list          show every set: addresses, disk need, target folder; fetches nothing
  --dir DIR       where the sets go (default: the folder of this script); scripts then take --data_root DIR
  --archive FILE  unpack an archive that you already have; its content tells which set it is
                  (also PointCloudDatasets, modelnet40_normal_resampled and ModelNet40.zip)
  --keep          keep the archives after unpacking (in DIR/.download)
  --again         fetch a set although its folder is there already; your files are never overwritten

A run that stopped half way is continued by the same command. The Google Drive archives need gdown, which
`make setup` installs. PYTHON names the interpreter to use (default: .venv/bin/python, else python3).
TEXT
}

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
sets=(shapenet shapenet_render modelnet40 scanobjectnn shapenetpart s3dis)

# The archives that the authors handed out on Google Drive: shapenet.tar.gz, shapenet_render.tar.gz, scanobjectnn.tar.gz,
# modelnet40.tar.gz and shapenet_part.tar.gz. Their script does not say which id is which archive, so the first megabytes of
# each are looked at, and the names of the members inside decide (data/unpack.py). What was found is kept in .download/.
drive_folder="https://drive.google.com/drive/folders/1dAH9R3XDV0z69Bz6lBaftmJJyuckbPmR"
drive_ids=(
  1F9XIhF1qngLt-GtdnOnXiTsXH84YtrbC
  1UUY729-4VK_igjKUzLn_ygm3LxwW23pX
  1r3nJ6gEu6cL59h7cIfMrBeY5p1P_JiIV
  15lmtRaHvVIPLOp_o7rms8e6VQp_en8WF
  1-Yhqgi7KH6guIej_4X8pciiybQB4pBWQ
)
peek_bytes=4194304

drive_has() { [[ "$1" != s3dis ]]; }

address_of() {  # the public address besides the Drive archives, if there is one
  case "$1" in
    modelnet40)      echo "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip" ;;
    shapenetpart)    echo "https://shapenet.cs.stanford.edu/media/shapenet_part_seg_hdf5_data.zip" ;;
    s3dis)           echo "https://shapenet.cs.stanford.edu/media/indoor3d_sem_seg_hdf5_data.zip" ;;
    shapenet_render) echo "http://cvgl.stanford.edu/data2/ShapeNetRendering.tgz" ;;
  esac
}

target_of() {
  case "$1" in
    shapenet)        echo "ShapeNet" ;;
    shapenet_render) echo "ShapeNetRendering" ;;
    modelnet40)      echo "modelnet40_ply_hdf5_2048" ;;
    scanobjectnn)    echo "ScanObjectNN" ;;
    shapenetpart)    echo "shapenet_part_seg_hdf5_data" ;;
    s3dis)           echo "indoor3d_sem_seg_hdf5_data" ;;
  esac
}

# Worked out from the number and shape of the arrays, uncompressed; the sizes of the archives are not published.
need_of() {
  case "$1" in
    shapenet)        echo "1.1 GB (43,783 clouds of 2,048 points as float32); archive: unknown" ;;
    shapenet_render) echo "unknown (views of 43,783 shapes); archive: unknown" ;;
    modelnet40)      echo "at least 0.3 GB (12,308 clouds of 2,048 points); archive: unknown" ;;
    scanobjectnn)    echo "at least 0.07 GB for OBJ_BG (2,890 clouds of 2,048 points); archive: unknown" ;;
    shapenetpart)    echo "at least 0.45 GB (16,881 clouds of 2,048 points with part labels); archive: unknown" ;;
    s3dis)           echo "up to 3.6 GB (23,585 blocks of 4,096 points with 9 values); archive: unknown" ;;
  esac
}

by_hand() {  # what to do where no address works
  case "$1" in
    scanobjectnn)
      echo "  By hand: fill in the form at https://hkust-vgd.github.io/scanobjectnn and unpack h5_files, so that there are"
      echo "    $dir/ScanObjectNN/main_split/training_objectdataset.h5 and test_objectdataset.h5             (OBJ_BG)"
      echo "    $dir/ScanObjectNN/main_split_nobg/training_objectdataset.h5 and test_objectdataset.h5        (OBJ_ONLY)"
      echo "    $dir/ScanObjectNN/main_split/{training,test}_objectdataset_augmentedrot_scale75.h5           (PB_T50_RS)" ;;
    s3dis)
      echo "  By hand: fill in the form at http://buildingparser.stanford.edu/dataset.html and take"
      echo "    Stanford3dDataset_v1.2_Aligned_Version, the raw rooms; this cuts them into blocks:"
      echo "    python -m datasets.s3dis_prepare --raw Stanford3dDataset_v1.2_Aligned_Version --out $dir" ;;
    shapenet | shapenet_render)
      echo "  By hand: the Drive folder in a browser, $drive_folder"
      echo "    then: bash data/download_data.sh --archive FILE" ;;
    *)
      echo "  By hand: any copy of the archive will do, its checksums are compared: bash data/download_data.sh --archive FILE" ;;
  esac
}

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

list_sets() {
  local name address
  for name in "${sets[@]}"; do
    address="$(address_of "$name")"
    say "$name"
    say "  target:  $dir/$(target_of "$name")"
    say "  disk:    $(need_of "$name")"
    if drive_has "$name"; then say "  address: $drive_folder (the released archives; fetched by id)"; fi
    if [[ -n "$address" ]]; then say "  address: $address"; fi
    by_hand "$name"
  done
  say "free in $dir: $(free_bytes | awk '{printf "%.1f GB", $1 / 1e9}')"
}

free_bytes() {
  local folder="$dir"
  while [[ ! -d "$folder" ]]; do folder="$(dirname "$folder")"; done
  df -Pk "$folder" | awk 'NR == 2 {printf "%.0f\n", $4 * 1024}'
}

unpack() { (cd "$root" && "$python" -m data.unpack "$@"); }

# fetch_url ADDRESS FILE: continue FILE.part, then give it its final name.
fetch_url() {
  local address="$1" file="$2" size have rc=0
  size="$(curl --silent --location --head --connect-timeout 20 "$address" 2>/dev/null |
    tr -d '\r' | awk 'tolower($1) == "content-length:" {n = $2} END {print n}')" || size=""
  if [[ "$size" =~ ^[0-9]+$ ]]; then
    say "  the archive has $(awk -v n="$size" 'BEGIN {printf "%.2f GB", n / 1e9}')"
    have=0
    if [[ -f "$file.part" ]]; then have="$(wc -c < "$file.part")"; fi
    if (( size - have > $(free_bytes) )); then fail "not enough space in $dir for $address"; fi
    if (( have == size && size > 0 )); then mv "$file.part" "$file"; return 0; fi
  else
    say "  the server does not say how large the archive is"
  fi
  if [[ -s "$file.part" ]]; then say "  continuing at $(wc -c < "$file.part") bytes"; fi
  curl --fail --location --retry 3 --connect-timeout 20 --continue-at - --output "$file.part" "$address" || rc=$?
  if (( rc == 33 || rc == 36 )); then
    say "  the server cannot continue a download; starting again"
    rm -f "$file.part"
    rc=0
    curl --fail --location --retry 3 --connect-timeout 20 --output "$file.part" "$address" || rc=$?
  fi
  (( rc == 0 )) || return 1
  mv "$file.part" "$file"
}

# Look at the beginning of every Drive archive that is not known yet, and note which set it holds in .download/ID.set.
look_at_drive() {
  local id start found ids=() starts=()
  for id in "${drive_ids[@]}"; do
    start="$work/$id.start"
    if [[ -s "$work/$id.set" || -s "$work/$id.archive" ]]; then continue; fi
    # head closes the pipe when it has enough, which gdown reports as an error; only an empty start is one.
    "$gdown" --quiet -O - "$id" 2> "$work/$id.log" | head -c "$peek_bytes" > "$start" || true
    if [[ -s "$start" ]]; then
      ids+=("$id")
      starts+=("$start")
    else
      say "  Drive $id: no answer"
      tail -n 3 "$work/$id.log" >&2 || true
      rm -f "$start"
    fi
    rm -f "$work/$id.log"
  done
  if (( ${#ids[@]} == 0 )); then return 0; fi
  # One line for each archive; one that cannot be told from its beginning is "unknown".
  unpack --peek "${starts[@]}" > "$work/peeked" || return 1
  exec 3< "$work/peeked"
  for id in "${ids[@]}"; do
    IFS= read -r found <&3 || found=unknown
    say "  Drive $id: $found"
    say "$found" > "$work/$id.set"
  done
  exec 3<&-
  rm -f "${starts[@]}" "$work/peeked"
}

# fetch_drive SET: find and fetch the archive of a set; its path is left in $archive.
fetch_drive() {
  local name="$1" id found
  if [[ -z "$gdown" ]]; then say "  Google Drive needs gdown; run: make setup"; return 1; fi
  look_at_drive || return 1
  for id in "${drive_ids[@]}"; do
    archive="$work/$id.archive"
    if [[ "$(cat "$work/$id.set" 2> /dev/null)" == "$name" ]]; then
      "$gdown" --continue -O "$archive" "$id" && return 0
      return 1
    fi
  done
  # An archive whose beginning does not tell is fetched whole; all of its member names then decide.
  for id in "${drive_ids[@]}"; do
    archive="$work/$id.archive"
    [[ "$(cat "$work/$id.set" 2> /dev/null)" == unknown ]] || continue
    "$gdown" --continue -O "$archive" "$id" || continue
    found="$(unpack --peek "$archive")" || continue
    say "$found" > "$work/$id.set"
    if [[ "$found" == "$name" ]]; then return 0; fi
    say "  $archive holds another set ($found); it is kept"
  done
  return 1
}

install_archive() {  # SET: unpack $archive
  say "  unpacking $archive"
  if ! unpack "$archive" --data_root "$dir" --expect "$1"; then return 1; fi
  if (( keep == 0 )); then rm -f "$archive"; fi
}

get_set() {
  local name="$1" address target pending="$work/$1.pending"
  address="$(address_of "$name")"
  target="$dir/$(target_of "$name")"
  say "$name -> $target"
  if [[ ! -e "$pending" ]] && (( again == 0 )) && [[ -n "$(ls -A "$target" 2>/dev/null)" ]]; then
    say "  is there already, nothing is fetched (check it: python -m data.check_data --data_root $dir; fetch it: --again)"
    return 0
  fi
  say "  disk: $(need_of "$name"); free: $(free_bytes | awk '{printf "%.1f GB", $1 / 1e9}')"
  mkdir -p "$work"
  : > "$pending"
  # ModelNet40 and ShapeNetPart have an address that names the set, so it comes before the search on the Drive.
  # ShapeNetRendering.tgz holds the views of another release (3D-R2N2), so the released archive comes first there.
  local sources=(drive address) source
  case "$name" in modelnet40 | shapenetpart) sources=(address drive) ;; esac
  for source in "${sources[@]}"; do
    if [[ "$source" == address && -n "$address" ]]; then
      say "  from $address"
      archive="$work/$(basename "$address")"
      if [[ ! -f "$archive" ]] && ! fetch_url "$address" "$archive"; then say "  not to be had there now"; continue; fi
    elif [[ "$source" == drive ]] && drive_has "$name"; then
      say "  from $drive_folder"
      if ! fetch_drive "$name"; then say "  not to be had there now"; continue; fi
    else
      continue
    fi
    if install_archive "$name"; then rm -f "$pending"; return 0; fi
    say "  the archive is kept: $archive (delete it to fetch it anew)"
  done
  say "  $name was not installed."
  by_hand "$name"
  return 1
}

dir="$here"
keep=0
again=0
list=0
wanted=()
archives=()
while (( $# )); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --list) list=1 ;;
    --keep) keep=1 ;;
    --again) again=1 ;;
    --dir) [[ $# -ge 2 ]] || fail "--dir needs a folder"; dir="$2"; shift ;;
    --archive) [[ $# -ge 2 ]] || fail "--archive needs a file"; archives+=("$2"); shift ;;
    -*) usage >&2; fail "unknown option $1" ;;
    all) wanted+=("${sets[@]}") ;;
    *)
      [[ " ${sets[*]} " == *" $1 "* ]] || fail "unknown set '$1'; the sets are: ${sets[*]} all"
      wanted+=("$1") ;;
  esac
  shift
done

case "$dir" in /*) ;; *) dir="$PWD/$dir" ;; esac
work="$dir/.download"
archive=""

if (( list )); then list_sets; exit 0; fi
if (( ${#wanted[@]} + ${#archives[@]} == 0 )); then usage >&2; exit 2; fi

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  if [[ -x "$root/.venv/bin/python" ]]; then python="$root/.venv/bin/python"; else python=python3; fi
fi
command -v "$python" > /dev/null || fail "no Python at '$python'; run: make setup"
gdown="$(command -v gdown || true)"
if [[ -z "$gdown" && -x "$(dirname "$(command -v "$python")")/gdown" ]]; then
  gdown="$(dirname "$(command -v "$python")")/gdown"
fi
mkdir -p "$dir" || fail "cannot write $dir"

for file in ${archives[@]+"${archives[@]}"}; do
  case "$file" in /*) ;; *) file="$PWD/$file" ;; esac
  unpack "$file" --data_root "$dir"
done

missing=()
for name in ${wanted[@]+"${wanted[@]}"}; do
  get_set "$name" || missing+=("$name")
done
rmdir "$work" 2> /dev/null || true
if (( ${#missing[@]} )); then fail "not installed: ${missing[*]}"; fi
